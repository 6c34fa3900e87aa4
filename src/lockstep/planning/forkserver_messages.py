"""Forkserver messages: what an agent and its forkserver say to each other.

    request        what it asks for                  answer          with these descriptors
    Preload        torch, and no task                Preloaded
    LoadTask       the task, its model and data      TaskLoaded      the data sets, to be sent on
    CloneServer    a copy with what this one has     ServerCloned    its channel, its pidfd
    SetUp          the segments, by the plan         StateReady      state, snapshot, control, slots
    ForkWorker     a worker                          WorkerForked    its channel, its pidfd
    CheckPurity    a trial of the first step         PurityChecked
    MeasureJob     shards and steps, for the plan    JobMeasured
    ComputeShard   a worker's shard once more        ShardForked     its pidfd

The last is a worker's own request, on a channel that it has from its fork.
Instead of an answer there may be `RequestFailed`. When a child ends, `ChildExited` comes unasked.
"""

from __future__ import annotations

from lockstep.planning.job_profile import Measurement
from lockstep.planning.memory_layout import Layout
from lockstep.planning.metric_decisions import Told
from lockstep.planning.plan import Plan
from lockstep.planning.slot_map import SlotMap
from lockstep.system.messages import Codec, Count, ErrorMessage, JsonText, Message, OsText
from lockstep.system.unix_channel import Channel, MessageChannel

# Requests.


class Preload(Message):
    """Import what every run needs."""


class LoadTask(Message):
    """Build a task, its model and its data sets. The first descriptor is the pickled task, if the
    source is no name; the last the data, if `data_bytes` is not 0."""

    name: OsText
    """As in `TaskSource`; so are the next four."""
    args: JsonText
    code: str
    code_folder: OsText
    offered: bool
    functions: bool
    has_payload: bool
    settings: JsonText
    """What was set for the job; the rest is the task's recipe's to say."""
    records: JsonText
    """Which file takes the place of the task's data: `{"path", "keep"}`, or null."""
    data_bytes: int
    """How much another host has sent, of data sets or of that file; 0: nothing."""
    networked: bool
    """Whether the facts are to be compared with other hosts'."""
    folder: OsText
    """Where to work."""
    search_path: tuple[OsText, ...]
    """Where modules are looked for."""
    argv: tuple[OsText, ...]
    """What the task's code finds in `sys.argv`."""


class CloneServer(Message):
    """Fork the forkserver, with what it has loaded."""

    environment: dict[OsText, OsText] | None
    """What the clone's is to be, with the descriptor that comes along as stdout and stderr."""


class SetUp(Message):
    """Allocate the run's shared memory and move the model there."""

    plan: Plan
    networked: bool
    """Whether other hosts may take part."""


class ForkWorker(Message):
    """Fork a worker."""

    worker_id: int


class CheckPurity(Message):
    """Find out whether a shard's gradient depends on what its process has computed before."""


class MeasureJob(Message):
    """Compute shards and steps for a moment, in forks, and tell what they take. The state is not
    that of the job afterwards."""

    workers: Count
    """How many compute side by side."""
    sizes: tuple[int, ...]
    """Of shards, in samples; the job's own first."""
    budget: float
    """Seconds, after which no other size is begun."""
    limit: float
    """Seconds, after which it is given up."""


class ComputeShard(Message):
    """Compute a shard in a fork in which nothing has been computed. It writes a `pristine.Outcome`
    to the descriptor that comes along."""

    step: int
    shard: int
    explain: bool
    """Whether what the task's objects hold is to be digested, too."""
    told: tuple[Told, ...]
    """What the task's schedule has been told, where it waits for a metric."""


Request = Preload | LoadTask | CloneServer | SetUp | ForkWorker | CheckPurity | MeasureJob

# Answers.


class Preloaded(Message):
    """What every run needs is imported."""


class TaskLoaded(Message):
    """The task is built."""

    facts: JsonText
    """About it, for the plan and the manifest."""
    data_bytes: int
    """How much there is of the data sets, if they are to be sent to other hosts; else 0."""


class ServerCloned(Message):
    """There is another forkserver."""

    pid: int


class StateReady(Message):
    """The shared memory is there."""

    layout: Layout
    slot_map: SlotMap
    segment_bytes: tuple[int, ...]
    """Of each segment, in the order of the descriptors. Those of boards may follow: of their words,
    and of two buffers for each member."""
    profile: JsonText
    """The numerics that workers compute with."""
    scheduler_metric: str
    """The held-out metric that the task's schedule waits for; "": it does not wait."""
    cuts: JsonText
    """What became of each module with matrices, where they are cut into slices."""


class WorkerForked(Message):
    """There is a worker."""

    pid: int


class PurityChecked(Message):
    """It does not, or that cannot be told."""


class JobMeasured(Message):
    """What they take; None: a shard failed, which the workers will tell of, or it took too long."""

    found: Measurement | None


class ShardForked(Message):
    """A shard is being computed."""

    pid: int


class ChildExited(Message):
    """A worker, a clone or a pristine fork has ended."""

    pid: int
    code: int
    """Its exit code; negative: the signal that killed it."""


class RequestFailed(Message):
    """What was asked for could not be done."""

    error: ErrorMessage


Answer = (
    Preloaded
    | TaskLoaded
    | ServerCloned
    | StateReady
    | WorkerForked
    | PurityChecked
    | JobMeasured
    | ChildExited
    | RequestFailed
)

REQUESTS: Codec[Request] = Codec(Request)
ANSWERS: Codec[Answer] = Codec(Answer)
COMPUTE_SHARD: Codec[ComputeShard] = Codec(ComputeShard)
SHARD_FORKED: Codec[ShardForked] = Codec(ShardForked)
ToForkServer = MessageChannel[Request, Answer]
ToClient = MessageChannel[Answer, Request]
ToPristine = MessageChannel[ComputeShard, ShardForked]
ToComputing = MessageChannel[ShardForked, ComputeShard]


def to_forkserver(channel: Channel) -> ToForkServer:
    """The agent's end of a channel between the two."""
    return MessageChannel(channel, REQUESTS, ANSWERS)


def to_client(channel: Channel) -> ToClient:
    """The forkserver's end."""
    return MessageChannel(channel, ANSWERS, REQUESTS)


def to_pristine(channel: Channel) -> ToPristine:
    """A worker's end of its channel to the forkserver."""
    return MessageChannel(channel, COMPUTE_SHARD, SHARD_FORKED)


def to_computing(channel: Channel) -> ToComputing:
    """The forkserver's end."""
    return MessageChannel(channel, SHARD_FORKED, COMPUTE_SHARD)
