"""Job: a task with the settings of its run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lockstep.errors import JobError
from lockstep.job.faults import Fault
from lockstep.job.setting_checks import check_together
from lockstep.job.settings import setting, settings_of
from lockstep.job.task import Task


@dataclass(frozen=True, kw_only=True)
class Job:
    """Job: a task and its settings. `None` means: the plan decides.

    Values are checked here, and kept as JSON can hold them.
    """

    task: Task | str
    """A `Task`, a recipe's name, `module:Task`, or `file.py:Task`."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the recipe or of the task's constructor, when `task` is a name."""
    faults: tuple[Fault, ...] = ()
    """Scripted faults, for tests."""

    # What the results depend on, bit for bit.
    seed: int = setting(
        0,
        help="Seed of the initial parameters, the order of the data, dropout and augmentation.",
        least=0,
        most=2**63 - 1,
        changes_numbers=True,
    )
    batch_size: int | None = setting(
        None, help="Samples per step, over all workers.", least=1, unset="64", changes_numbers=True
    )
    shuffle: bool = setting(
        True,
        help="Draw a new order of the training data for each data epoch.",
        detail="Without it, the order is that of the data set.",
        options=("--shuffle/--no-shuffle",),
        changes_numbers=True,
    )
    drop_last: bool = setting(
        False,
        help="Leave out the last batch of a data epoch where it is short.",
        detail="As the `drop_last` of PyTorch's `DataLoader`.",
        options=("--drop-last",),
        changes_numbers=True,
    )
    data_epochs: float | None = setting(
        None,
        help="Passes over the training data; a fraction is allowed.",
        least=0,
        unset="1",
        changes_numbers=True,
    )
    steps: int | None = setting(
        None, help="Optimizer updates, instead of `data_epochs`.", least=0, changes_numbers=True
    )
    shards: int | None = setting(
        None,
        help="Fixed slices of each batch: the most workers that there can be.",
        detail="By default 8 for batches of 512 or more, else 4: it never depends on the machine.",
        least=1,
        unset="by `batch_size`",
        changes_numbers=True,
    )
    threads: int | None = setting(
        None,
        help="Intra-op threads per worker.",
        least=1,
        most=1024,
        unset="1",
        changes_numbers=True,
    )
    clip_grad_norm: float | None = setting(
        None,
        help="Maximum of the global gradient norm.",
        detail="Computed as by `torch.nn.utils.clip_grad_norm_`; with `local_steps`, the norm of "
        "each shard's own gradient is limited, in each of its updates.",
        above=0,
        changes_numbers=True,
    )
    precision: Literal["fp32", "bf16"] = setting(
        "fp32",
        help="Precision of the forward and backward pass.",
        detail='`bf16`: loss and metrics run under `torch.autocast("cpu", torch.bfloat16)`.',
        changes_numbers=True,
    )
    numerics: Literal["native", "portable"] = setting(
        "native",
        help="Instruction set of the kernels; `portable` is AVX2, so that processors agree.",
        changes_numbers=True,
    )
    memory_format: Literal["contiguous", "channels_last"] = setting(
        "contiguous",
        help="Order of the elements in 4-D parameters, that is, in the weights of convolutions.",
        detail="`channels_last`: as by `model.to(memory_format=torch.channels_last)`; faster for "
        "some convolutions, slower for others. Exported models are contiguous.",
        changes_numbers=True,
    )
    device: Literal["cpu", "cpu-apart", "cuda"] = setting(
        "cpu",
        help="Where shards are computed and blocks updated.",
        detail="`cpu-apart`: workers with memory of their own, for tests of what a GPU needs; the "
        "same bits as `cpu`. `cuda`: a GPU a worker, other bits; it has not been run, and needs "
        "`experimental`. See [devices.md](devices.md).",
        changes_numbers=True,
    )
    compile: bool = setting(
        False,
        help="Compile the loss and its gradient with `torch.compile`'s compiler; needs g++.",
        detail="Other bits than without, the same for any number of workers and hosts; with one "
        "thread per worker. See [architecture.md](architecture.md#traced-shards).",
        changes_numbers=True,
    )
    slices: int = setting(
        1,
        help="Fixed slices of each matrix, each a parameter of its own.",
        detail="The loss differs from that of 1 within rounding. See [slices.md](slices.md).",
        least=1,
        most=1024,
        changes_numbers=True,
    )
    slice_plan: Mapping[str, str] | None = setting(
        None,
        help="With `slices`: which matrices are cut and how, in the words of transformers.",
        detail="A mapping such as `{layers.*.mlp.up_proj: colwise, layers.*.mlp.down_proj: "
        "rowwise}`; nothing else is cut then.",
        expected="a mapping of modules' names to colwise, rowwise or heads",
        options=None,
        unset="by the model's structure",
        changes_numbers=True,
    )
    eval_batch_size: int | None = setting(
        None,
        help="Samples per held-out batch; the last bits of the metrics depend on it.",
        least=1,
        unset="`batch_size`",
        changes_numbers=True,
    )
    monitor: str | None = setting(
        None,
        help="Held-out metric that says which state is the best: its checkpoint is kept.",
        detail="`result.best` says which it is, and `predict` and `evaluate` take "
        "`--checkpoint best`.",
        changes_numbers=True,
    )
    monitor_mode: Literal["min", "max"] = setting(
        "min",
        help="Whether small or large values of `monitor` are good.",
        changes_numbers=True,
    )
    stop_patience: int | None = setting(
        None,
        help="Stop early when `monitor` has not improved in so many evaluations.",
        detail="There is one after each data epoch. `result.stopped_early` says why.",
        least=1,
        changes_numbers=True,
    )
    stop_min_delta: float = setting(
        0.0,
        help="With `stop_patience`: by how much `monitor` has to improve for it to count.",
        least=0,
        changes_numbers=True,
    )
    local_steps: int = setting(
        1,
        help="Optimizer updates that each shard makes between two exchanges, for slow links.",
        detail="A step is then a local SGD round of so many batches.",
        least=1,
        changes_numbers=True,
    )
    compression: Literal["none", "bf16", "int8", "topk"] = setting(
        "none",
        help="Compression of the gradients that hosts exchange, for slow links.",
        detail="Results are the same for any number of hosts. See [hosts.md](hosts.md#slow-links).",
        changes_numbers=True,
    )
    groups: int | None = setting(
        None,
        help="With `compression`: number of equal groups that the shards are divided into.",
        detail="Each group sends the others one small sum. A group has 1, 2, 4, … shards; there "
        "are at least as many groups as hosts.",
        least=1,
        unset="`shards`",
        changes_numbers=True,
    )
    data: Literal["build", "ship", "local"] = setting(
        "build",
        help="Where the other hosts of a job get the data sets.",
        detail="`build`: each builds them with the task; `ship`: the master sends them; `local`: "
        "each has a part of its own ([how](hosts.md#where-the-data-comes-from)). Only `local` "
        "changes the numbers. On the command line `--host-data`, since recipes have a `--data`.",
        options=("--host-data",),
        changes_numbers=True,
    )

    # What they do not depend on.
    workers: int | None = setting(
        None,
        help="Worker processes, at most `shards`.",
        detail="Without it, as many as make a step quickest, up to one a core: predicted from what "
        "a shard takes, and the best two timed. See [planning.md](planning.md).",
        least=1,
        unset="measured",
        options=("--workers", "-w"),
    )
    team: int = setting(
        1,
        help="With `slices`: how many workers compute a shard together, each some of its slices.",
        detail="At most `slices` and `workers`; there may be `shards` times `team` workers. On one "
        "host, and not with `compile`. See [slices.md](slices.md#teams).",
        least=1,
        most=1024,
    )
    max_workers: int | None = setting(
        None,
        help="Largest number of workers that `lockstep scale` may ask for, at most `shards`.",
        detail="With teams, at most `shards` times `team`.",
        least=1,
        unset="`shards`",
    )
    loaders: int | None = setting(
        None,
        help="Data-loading processes per worker; 0: the worker loads its own.",
        least=0,
        most=1024,
        unset="measured",
    )
    ownership: Literal["replicated", "sharded", "servers", "slices"] = setting(
        "replicated",
        help="On several hosts: which host keeps and updates which parameters.",
        detail="`replicated`: each all; `sharded`: each its part; `servers`: the hosts in "
        "`servers`, which compute no gradients; `slices`: each has some of the `slices` alone, and "
        "all compute each shard together. See [hosts.md](hosts.md#who-updates-what).",
    )
    hosts: Literal["all", "planned"] = setting(
        "all",
        help="With other hosts: whether all take part, or those with which a step is quickest.",
        detail="`planned`: what a step takes is predicted for each choice of hosts, from what a "
        "shard takes on each and what the links move. See [planning.md](planning.md).",
    )
    servers: Sequence[str] = setting(
        (),
        help="Names of the hosts that are servers, where `ownership` is servers.",
        expected="names of hosts",
        options=("--server",),
    )
    cluster: Mapping[str, Sequence[str]] | None = setting(
        None,
        help="The processes of the job, each started by `lockstep rank --task worker:0 JOB`.",
        detail="`{worker: [host:port, …], ps: [host:port, …]}`: see "
        "[clusters.md](clusters.md#workers-and-parameter-servers).",
        expected="a mapping of `worker` and `ps` to lists of host:port",
        options=None,
    )
    ship_code: bool = setting(
        False,
        help="Send the task's module or package to the other hosts of a job.",
        detail="They take it only if its digest is allowed there "
        "([how](clusters.md#code-that-is-sent)).",
        options=("--ship-code",),
    )
    evaluate: bool = setting(
        True,
        help="Evaluate after each data epoch and at the end, where there is held-out data.",
        options=None,
    )
    checkpoint_steps: int | None = setting(
        None,
        help="Write a checkpoint every so many steps.",
        detail="One is always written at the end.",
        least=1,
    )
    checkpoint_seconds: float | None = setting(
        None,
        help="Write a checkpoint when so many seconds have passed since the last.",
        detail="Without it and `checkpoint_steps` there is one at the end of each data epoch, too; "
        "more rarely where checkpoints would cost over 1 % of the time "
        "([figures](checkpoints.md)).",
        least=0,
        unset="60",
    )
    keep_checkpoints: int = setting(
        5, help="Number of checkpoints to keep, the newest.", least=1, options=None
    )
    audit: float = setting(
        0.0,
        help="Fraction of shards computed twice, and of blocks whose memory is checked, 0 to 1.",
        detail="It finds silent corruption, at about that fraction of the computing time.",
        least=0,
        most=1,
    )
    purity: float = setting(
        0.01,
        help="Fraction of the time in which shards are computed again in fresh processes; 0: none.",
        detail="What a task, a data set or a module remembers from shard to shard is found by it, "
        "before the first step and then at random times. See "
        "[guarantees.md](guarantees.md#what-remembers-is-refused).",
        least=0,
        most=1,
    )
    trace: Literal["auto", "always", "never"] = setting(
        "auto",
        help="Shards that are run as one list of kernels, without autograd and modules.",
        detail="The same kernels in the same order: no bit depends on it. `auto`: where shards are "
        "small and many are left. Not with `stall_seconds` below 10: tracing takes a second or "
        "more, without a heartbeat. See [architecture.md](architecture.md#traced-shards).",
    )
    native: Literal["auto", "never"] = setting(
        "auto",
        help="Parts of a step that are run without the interpreter, in C++.",
        detail="The same kernels in the same order: no bit depends on it. `auto`: where "
        "`lockstep build-native` has built them, once per machine. See "
        "[architecture.md](architecture.md#native-path).",
    )
    stall_seconds: float | None = setting(
        None,
        help="Timeout in seconds after which a worker without a heartbeat is replaced.",
        least=0,
        unset="ten times the longest step, at least 30; 300 at first; 1 if the process is stopped",
    )
    host_seconds: float = setting(
        10.0,
        help="Timeout in seconds after which a host without a heartbeat counts as lost.",
        least=0.5,
    )
    exchange_seconds: float | None = setting(
        None,
        help="Timeout in seconds after which a host that exchanges nothing counts as lost.",
        detail="Hosts are regrouped first; it is lost if it goes on. Its heartbeat does not count.",
        least=0.5,
        unset="twenty times the longest step, at least 60; 600 while a host begins",
    )
    experimental: bool = setting(
        False,
        help="Allow what has been written and not been run: `device` cuda.",
        options=("--experimental",),
    )
    run_name: str | None = setting(
        None,
        help="Name of the run: of its folder, and for loggers.",
        detail="Not `name`, which tasks have arguments of.",
        unset="the task's",
    )
    tags: Sequence[str] = setting(
        (),
        help="Tags of the run, in its manifest and for loggers.",
        expected="texts",
        options=("--tag",),
    )
    log: Sequence[str] = setting(
        (),
        help="Where metrics are written besides: tensorboard, mlflow, wandb or trackio.",
        detail="Each needs its package. They have the first 1,000 steps, and then up to four in a "
        "second. TensorBoard's files are in the run folder: `tensorboard --logdir runs`.",
        expected="names of loggers",
        options=("--log",),
    )
    out: str | os.PathLike[str] | None = setting(
        None,
        help="The run folder; it must not exist.",
        unset="`runs/NAME-NUMBER`",
    )

    def __post_init__(self) -> None:
        for name, each in SETTINGS.items():
            object.__setattr__(self, name, each.checked(getattr(self, name)))
        defaults = {name: each.default for name, each in SETTINGS.items()}
        check_together({name: getattr(self, name) for name in defaults}, defaults)
        if self.args and not isinstance(self.task, str):
            raise JobError(
                "args are given, but the task is an object",
                expected="args with a task that is named",
                found=", ".join(self.args),
                fix="give them to the task's constructor",
            )

    def replace(self, **changes: Any) -> Job:
        """A copy with the given settings changed."""
        try:
            return dataclasses.replace(self, **changes)
        except TypeError as error:
            raise JobError(
                f"unknown setting: {error}", fix=f"settings: {', '.join(SETTINGS)}"
            ) from None

    def replace_args(self, args: Mapping[str, Any]) -> Job:
        """A copy with other arguments for the named task."""
        return dataclasses.replace(self, args=args)


SETTINGS = settings_of(Job)
"""The settings of a job, by name."""
