"""Worker messages: what an agent and a worker of its host say to each other.

The agent's are commands, the worker's are events. A worker runs steps by itself, up to the lease in
the control segment, and says when it rests.
"""

from __future__ import annotations

from collections.abc import Callable

from lockstep.planning.assignment import Assignment
from lockstep.planning.metric_decisions import Told
from lockstep.system.messages import Codec, ErrorMessage, JsonText, Message
from lockstep.system.unix_channel import Channel, MessageChannel

# From the agent.


class RunSteps(Message):
    """Run steps up to the lease's end."""


class MetricTold(Message):
    """The metric that the task's schedule waits for has been evaluated."""

    told: Told


class InferBatches(Message):
    """Evaluate held-out batches, or predict from them: answer with a `BatchDone` for each, then
    `BatchesDone`."""

    round: int
    """Comes back with the answers: those to an earlier question are dropped."""
    predict: bool
    batches: tuple[int, ...]
    together: bool = False
    """Whether the worker's team computes them together; then its leader answers."""


class ScoreOutputs(Message):
    """Score what was gathered of all held-out samples: answer with `Scored`."""

    round: int
    outputs: JsonText
    """Of type `eval_batches.Outputs`."""
    baseline: bool
    """Whether the task's baseline is asked for, too."""


class Stop(Message):
    """Leave: the process ends."""


AgentMessage = Assignment | RunSteps | MetricTold | InferBatches | ScoreOutputs | Stop

# From the worker.


class Started(Message):
    """The process is ready to join. Comes with a descriptor: where its stack is written to when it
    is asked for it by SIGUSR1."""

    probe: str
    """The bits that this process computes, for comparison."""


class Rested(Message):
    """The lease's end is reached."""

    step: int
    """How many steps are committed."""


class Interrupted(Message):
    """The membership epoch has changed: the step in flight is left as it is."""


class BatchDone(Message):
    """What was made of a held-out batch."""

    round: int
    batch: int
    result: JsonText
    """Of type `eval_batches.BatchSums`, or a row of predictions per sample."""


class BatchesDone(Message):
    """All batches that were asked for are done: the worker rests again."""


class Scored(Message):
    """What came of scoring."""

    round: int
    metrics: dict[str, float]
    baseline: dict[str, float]
    """Empty if it was not asked for."""


class ShardCorrupted(Message):
    """A shard's gradient was wrong, and has been put right."""

    step: int
    shard: int
    worker_id: int
    """Who computed it wrong."""


class StateCorrupted(Message):
    """The committed state has changed in memory: the worker has left the step."""

    step: int
    worker_id: int
    """Who found it."""
    tensor: str
    elements: tuple[int, int]
    """Of the tensor: the first and the one after the last of the block in which it is."""


class ShardsTraced(Message):
    """The worker runs shards of one more form as a list of kernels, or has given up trying."""

    forms: int
    """Of batches, so far."""
    why_not: str
    """Why no more will be; empty if there may."""
    native: bool = False
    """Whether the last of them is run without the interpreter."""
    why_not_native: str = ""


class StepsNative(Message):
    """The worker meets, sums and updates without the interpreter from now on, or `why_not`."""

    why_not: str


class LoaderLost(Message):
    """A loader process of this worker has died, and the worker ends for it."""


class WorkerFailed(Message):
    """The worker ends by an error."""

    error: ErrorMessage
    step: int


WorkerMessage = (
    Started
    | Rested
    | Interrupted
    | BatchDone
    | BatchesDone
    | Scored
    | ShardCorrupted
    | StateCorrupted
    | ShardsTraced
    | StepsNative
    | LoaderLost
    | WorkerFailed
)

Report = Callable[[WorkerMessage], None]
"""How a part of a worker tells the agent of something."""

FROM_AGENT: Codec[AgentMessage] = Codec(AgentMessage)
FROM_WORKER: Codec[WorkerMessage] = Codec(WorkerMessage)
ToWorker = MessageChannel[AgentMessage, WorkerMessage]
ToAgent = MessageChannel[WorkerMessage, AgentMessage]


def to_worker(channel: Channel) -> ToWorker:
    """The agent's end of a channel between the two."""
    return MessageChannel(channel, FROM_AGENT, FROM_WORKER)


def to_agent(channel: Channel) -> ToAgent:
    """The worker's end."""
    return MessageChannel(channel, FROM_WORKER, FROM_AGENT)
