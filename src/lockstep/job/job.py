"""What the user hands in: a `Task` (the code) and a `Job` (the task with its settings)."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lockstep.errors import JobError
from lockstep.job.faults import Fault
from lockstep.job.task import Task

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Job:
    """A task and the settings of its run. `None` means: let the plan decide.

    What the numbers depend on: the task, `seed`, `batch_size`, `shards`, `threads`,
    `local_steps`, `compression`, `groups`, `clip_grad_norm`, `precision`, `numerics`, and with
    `data` = `local` who has what. What they do not depend on: everything else, `workers` first
    of all.
    """

    task: Task | str
    """A `Task`, a recipe's name, `module:Task`, or `file.py:Task`."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for the recipe or for the task's constructor, when `task` is a name."""
    data_epochs: float | None = None
    """Passes over the training set (default 1); `steps` takes its place if given."""
    steps: int | None = None
    """Optimizer updates."""
    batch_size: int | None = None
    """Samples per step over all workers (default 64)."""
    workers: int | None = None
    """Worker processes; None: the plan measures which division of the cores is fastest."""
    shards: int | None = None
    """V, the fixed slices of each batch; default: the number of workers planned."""
    threads: int | None = None
    """Intra-op threads per worker; default: cores divided by workers."""
    local_steps: int = 1
    """Optimizer updates that each shard makes by itself between two exchanges (see
    `lockstep.optim.local_sgd`): for slow links between hosts. A step is then a round of so many
    batches. It changes the numbers, for any number of workers alike."""
    compression: Literal["none", "bf16", "int8", "topk"] = "none"
    """What gradients are made of before hosts exchange them (see
    `lockstep.state.gradient_codecs`): for slow links. It changes the numbers, for any number of
    workers and hosts alike."""
    groups: int | None = None
    """With `compression`: into how many equal groups the shards are divided; each gives the others
    one small sum. At least as many as hosts; default: a group for each shard."""
    ownership: Literal["replicated", "sharded", "servers"] = "replicated"
    """On several hosts: whether each updates everything, or its part of the parameters, or some of
    them, the `servers`, do that and compute no gradients (see `lockstep.planning.ownership`)."""
    servers: Sequence[str] = ()
    """The names of the hosts that are servers."""
    cluster: Mapping[str, Sequence[str]] | None = None
    """`{"worker": ["host:port", ...], "ps": [...]}`: the processes of the job, each of them started
    by `lockstep rank --task worker:0 JOB` (see `lockstep.cluster.ranks.cluster_spec`)."""
    seed: int = 0
    clip_grad_norm: float | None = None
    """Maximum of the global gradient norm, as `torch.nn.utils.clip_grad_norm_` has it; with
    `local_steps`, of the norm of each shard's own gradient, in each of its steps."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: loss and metrics run under `torch.autocast("cpu", torch.bfloat16)`."""
    numerics: Literal["native", "portable"] = "native"
    """`portable` pins kernels to AVX2, so that hosts with other processors agree."""
    eval_batch_size: int | None = None
    """Samples per held-out batch (default: `batch_size`)."""
    max_workers: int | None = None
    """How many workers `scale` may go up to, at most `shards`; default: `workers`."""
    stall_seconds: float | None = None
    """A worker that shows no sign of life for so long is replaced; default: ten times the longest
    step so far, at least 30 seconds (300 at first), and one second if the process is stopped."""
    host_seconds: float = 10.0
    """A host that gives no sign of life for so long is given up; the others go on."""
    audit: float = 0.0
    """The fraction of shards that are computed twice and of blocks whose memory is checked, 0 to
    1: it finds silent corruption, at about that fraction of the computing time."""
    data: Literal["build", "ship", "local"] = "build"
    """Where the hosts of a job have the data sets from: each builds them by the task; or the
    master sends them once (see `lockstep.data.dataset_shipping`); or each builds a part of its
    own, which stays there (see `lockstep.planning.data_partition`): then the numbers depend on who
    has what."""
    ship_code: bool = False
    """Send the task's module, or its package, to the other hosts of a job; they take it only if
    its digest was allowed there (see `lockstep.job.code_archive`)."""
    faults: tuple[Fault, ...] = ()
    """Scripted faults, for tests."""
    evaluate: bool = True
    """Evaluate after each data epoch and at the end, where there is held-out data."""
    loaders: int | None = None
    """Data-loading processes per worker; 0: in the worker; None: chosen from measured times."""
    checkpoint_steps: int | None = None
    """Write a checkpoint every so many steps; one is always written at the end."""
    checkpoint_seconds: float | None = None
    """Write a checkpoint when so many seconds have passed since the last."""
    keep_checkpoints: int = 5
    """How many checkpoints are kept, the newest ones."""
    out: str | os.PathLike[str] | None = None
    """The run folder (default `runs/NAME-NUMBER`). It must not exist. Kept as a string."""

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
                expected = " or ".join(_KIND_NAMES[kind] for kind in kinds)
                raise JobError(f"{name} has the wrong type", expected=expected, found=repr(value))
        object.__setattr__(self, "out", _path(self.out))  # settings are written as JSON
        for name in ("evaluate", "ship_code"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise JobError(
                    f"{name} has the wrong type", expected="true or false", found=repr(value)
                )
        if self.args and not isinstance(self.task, str):
            raise JobError(
                "args are given, but the task is an object",
                expected="args with a task that is named",
                found=", ".join(self.args),
                fix="give them to the task's constructor",
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            most = _MOST.get(name, math.inf)
            if value is not None and not (least <= value <= most and math.isfinite(value)):
                limits = f"at least {least}" + (f", at most {most}" if name in _MOST else "")
                raise JobError(f"{name} is out of range", expected=limits, found=repr(value))
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise JobError(
                "clip_grad_norm is out of range",
                expected="a number above 0",
                found=repr(self.clip_grad_norm),
            )
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise JobError(
                    f"{name} is not one of its values",
                    expected=" or ".join(allowed),
                    found=repr(getattr(self, name)),
                )
        if self.cluster is not None and not isinstance(self.cluster, Mapping):
            expected = "a mapping of `worker` and `ps` to lists of host:port"
            raise JobError(
                "cluster has the wrong type", expected=expected, found=f"{self.cluster!r}"
            )
        if self.groups is not None and self.compression == "none":
            raise JobError("groups are given without compression", fix="leave them out")
        if self.compression != "none" and self.ownership != "replicated":
            raise JobError(
                "compression does not go with this ownership: values of parameters are returned",
                expected="ownership = replicated",
                found=self.ownership,
                fix="leave one out",
            )
        if self.data == "local" and (self.ownership, self.compression) != ("replicated", "none"):
            raise JobError(
                "data = local goes with no other division of the work among hosts",
                expected="ownership = replicated, compression = none",
                found=f"ownership = {self.ownership}, compression = {self.compression}",
                fix="leave one out",
            )
        names = self.servers
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise JobError(
                "servers has the wrong type", expected="names of hosts", found=f"{names!r}"
            )
        if bool(names) != (self.ownership == "servers"):
            raise JobError(
                "servers and ownership do not fit each other",
                expected="names of servers with ownership = servers, and with no other",
                found=f"ownership = {self.ownership}, servers = {list(names)}",
                fix="set both, or neither",
            )
        if self.workers and self.shards and self.shards < self.workers:
            raise JobError(
                "there are more workers than shards: some would never have work",
                expected=f"shards >= workers = {self.workers}",
                found=f"shards = {self.shards}",
                fix=f"set shards to {self.workers} or more, or workers to {self.shards} or fewer",
            )

    def replace(self, **changes: Any) -> Job:
        """A copy with the given settings changed."""
        try:
            return dataclasses.replace(self, **changes)
        except TypeError as error:
            raise JobError(f"unknown setting: {error}", fix=f"settings: {SETTINGS}") from None

    def replace_args(self, args: Mapping[str, Any]) -> Job:
        """A copy with other arguments for the named task."""
        return dataclasses.replace(self, args=args)


def _path(out: object) -> str | None:
    """Raises: JobError: it is no path."""
    path = os.fspath(out) if isinstance(out, str | os.PathLike) else None
    if (path is None and out is not None) or isinstance(path, bytes):
        raise JobError(
            "out has the wrong type", expected="a str or a pathlib.Path", found=repr(out)
        )
    return path


_KIND_NAMES: dict[type, str] = {int: "a whole number", float: "a number"}
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ("steps", "batch_size", "workers", "shards", "threads", "seed", "eval_batch_size",
         "loaders", "checkpoint_steps", "max_workers", "keep_checkpoints", "local_steps",
         "groups"), (int,)
    ),
    **dict.fromkeys(
        ("data_epochs", "clip_grad_norm", "checkpoint_seconds", "stall_seconds", "host_seconds",
         "audit"),
        (int, float),
    ),
}  # fmt: skip
_LEAST: dict[str, float] = {
    "data_epochs": 0, "steps": 0, "batch_size": 1, "workers": 1, "shards": 1, "threads": 1,
    "eval_batch_size": 1, "loaders": 0, "checkpoint_steps": 1, "keep_checkpoints": 1,
    "checkpoint_seconds": 0, "stall_seconds": 0, "max_workers": 1, "seed": 0, "audit": 0,
    "host_seconds": 0.5, "local_steps": 1, "groups": 1,
}  # fmt: skip
_MOST = {"audit": 1, "seed": 2**63 - 1, "threads": 1024, "loaders": 1024}
_ALLOWED = {
    "precision": ("fp32", "bf16"),
    "numerics": ("native", "portable"),
    "data": ("build", "ship", "local"),
    "ownership": ("replicated", "sharded", "servers"),
    "compression": ("none", "bf16", "int8", "topk"),
}
SETTINGS = tuple(
    f.name for f in dataclasses.fields(Job) if f.name not in ("task", "args", "faults")
)
"""The names of a job's settings."""
