"""What the user hands in: a `Task` (the code) and a `Job` (the task with its settings)."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lockstep.errors import JobError, TaskError
from lockstep.job.position import Place
from lockstep.state.fault_injection import Fault

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset


class Task:
    """The user's code. Subclass it; `model`, `train_data`, `loss` and `optimizer` are required.

    One instance is made per run and forked into every worker. Methods that draw random numbers
    may use torch's, Python's and NumPy's global generators: they are seeded before each call
    (`lockstep.system.seeding` says from what), so the draws do not depend on the number of workers.
    """

    scheduler_interval: Literal["step", "data_epoch"] = "step"
    """When the scheduler is stepped: after every step, or after the last step of a data epoch."""
    planned_batch_size: int | None = None
    """Samples of an optimizer update in this run. Set by Lockstep before it calls `scheduler`."""

    def model(self) -> nn.Module:
        """Build the model, on the CPU, freshly initialised."""
        raise NotImplementedError

    def train_data(self) -> Dataset[Any]:
        """The training set: a map-style data set (`__len__` and `__getitem__`).

        `__getitems__(indices)`, if there, fetches a batch's samples at once, as in PyTorch.
        A `TensorDataset` is indexed without touching single samples.
        """
        raise NotImplementedError

    def eval_data(self) -> Dataset[Any] | None:
        """The held-out set, or None. Evaluated after every data epoch: every sample once."""
        return None

    def told(self, place: Place) -> None:
        """Where in the run the calls that follow belong: of how many steps which, and which batch.

        Called before `optimizer` and `scheduler` (with the run's beginning), and before each
        call of `loss`, `metrics`, `outputs`, `score` and `predict`, for what depends on the step,
        such as a weight that rises. What is kept must be made of `place` alone, not of what was
        kept before: a worker computes some shards only. Default: nothing.
        """

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The mean loss over the samples of `batch`: a scalar tensor with a graph."""
        raise NotImplementedError

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """An optimizer over `params`; `params.named()` gives names, to make groups from."""
        raise NotImplementedError

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        """A learning-rate schedule for `optimizer`, or None."""
        return None

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        """Held-out metrics of one batch, called without gradients and in eval mode.

        Each value is either one number per sample (a tensor of shape `[n]`, bool allowed) or
        one number: the mean over the batch. Both are averaged over samples, in float64, in
        the order of the data. The default is the loss.
        """
        try:
            return {"loss": self.loss(model, batch)}
        except Exception as error:
            error.add_note(
                "Task.metrics is not defined: held-out data go through loss(), without gradients"
            )
            raise

    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | Sequence[Any]]:
        """What `score` needs to know of one held-out batch; default: nothing.

        Called as `metrics` is. Each value has one entry per sample: a tensor of shape `[n, ...]`
        of numbers or booleans, or a list of `n` things that JSON can hold, such as texts.
        """
        return {}

    def score(self, outputs: dict[str, Any]) -> Mapping[str, float]:
        """Metrics that are no means over samples, such as AUC or BLEU.

        Called in one worker with the `outputs` of all held-out samples, in the order of the data:
        tensors of shape `[N, ...]` (float64, int64 or bool) and lists of length N. What it
        returns joins the means of `metrics`; the numbers are those of any number of workers.
        """
        return {}

    def baseline(self) -> Mapping[str, float]:
        """What something trivial reaches on the held-out data, by the names of the metrics.

        Called in one worker after the last step; shown beside the metrics. Default: nothing.
        """
        return {}

    def fitted(self) -> str:
        """What the training data decide besides the parameters, as a text: a vocabulary, ranges,
        the names of classes. Default: nothing.

        Called after `model`. A run records its digest, and where the data give another one, the
        run's model is neither evaluated nor asked for predictions.
        """
        return ""

    def from_record(self, record: Mapping[str, Any]) -> Any:
        """A record of a file to predict from, as a sample: what `collate` takes.

        A record is a row of a JSONL or Parquet file, its columns by name.
        """
        raise TaskError(
            f"{type(self).__name__} does not say what a record is",
            expected="Task.from_record(record): the sample that a row of the file stands for",
            fix="define it beside Task.predict; of an adapter it is an argument, from_record=",
        )

    def predict(self, model: nn.Module, batch: Any) -> Sequence[Mapping[str, Any]]:
        """What is predicted of a batch of samples: for each a row of what JSON can hold.

        Called as `metrics` is, with what `collate` makes of samples.
        """
        raise TaskError(
            f"{type(self).__name__} does not say what it predicts",
            expected="Task.predict(model, batch): a list with a mapping for each sample",
            fix="define it, beside Task.from_record; of an adapter it is an argument, predict=",
        )

    def collate(self, samples: list[Any]) -> Any:
        """Samples to a batch; the default is torch's `default_collate`."""
        from torch.utils.data import default_collate

        return default_collate(samples)


class Parameters(list["nn.Parameter"]):
    """The model's parameters that require gradients, in the model's order."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = list(named)
        super().__init__(parameter for _, parameter in self._named)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """`(name, parameter)` pairs, as `nn.Module.named_parameters` gives them."""
        return list(self._named)


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
    by `python -m lockstep.cluster.ranks.launcher --task worker:0 JOB` (see
    `cluster.description`)."""
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
