"""Host messages: what the agents of a job and its master say to each other.

    agent                                        master
    HostPresent     its task is loaded      ->
                                            <-   PlanAssigned    set up memory, start workers
                                            <-   HostRefused     or: it differs from the others
                                            <-   LinkProbe       what the link to it moves
    LinkProbed      one has come            ->
                                            <-   MeasureHost     what the job costs there
    HostMeasured    that                    ->
    HostReady       its workers wait        ->
                                            <-   PauseWorkers    a generation of hosts begins
    HostPaused      they are at rest        ->
                                            <-   ResumeWorkers   who computes what, from which step
                                            <-   LeaseExtended   how far they may run
    StepsRecorded   what they have computed ->
    ExchangeTrouble an exchange has failed  ->
    EventsForwarded for the run's events    ->
                                            <-   MetricEvaluated what a schedule waits for
                                            <-   InferBatches    held-out batches, at rest
    BatchChunk      what comes of them      ->
                                            <-   SendState       what this host alone has of it
                                            <-   JobEnded
    AgentFailed     it cannot go on         ->

Numbers and texts are bounded here. Whether the sender may say so now is for the receiver to check.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from lockstep.agent.regroup_messages import HostStatus, RegroupOrder
from lockstep.net.control_link import LINK_KINDS
from lockstep.net.handshake import FactsMap
from lockstep.planning.job_profile import JobProfile
from lockstep.system.messages import (
    Bytes,
    Codec,
    Count,
    ErrorMessage,
    Label,
    Message,
    Step,
    Text,
    check_plain,
)

MAX_EVENTS = 1000
"""Events, recoveries or steps in one message."""
CHUNK_CHARACTERS = 400_000
"""Of JSON in a message."""
MAX_CHUNKS = 1000
PROBE_BYTES = 1 << 19

Samples = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]
Workers = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Plain = dict[str, Any]
"""What JSON can hold, of a form that the sender knows; `check_plain` bounds it."""
AGENT_EVENTS = frozenset({
    "first_step", "died", "recovered", "lost_loader", "stalled", "failed", "not_saved",
    "spawned", "fork_failed", "regroup", "dismissed", "formed", "corrupt", "joined", "timed",
    "traced", "native",
})  # fmt: skip
"""The events that an agent has to tell of; all others are the master's own."""
RESERVED = frozenset({"time", "event", "name"})
StepDigest = Annotated[str, msgspec.Meta(max_length=128, pattern=r"\A[ -~]*\Z")]


# From an agent.


class HostPresent(Message):
    """This host has loaded the task."""

    workers: Workers
    facts: FactsMap
    train_samples: Samples
    eval_samples: Samples


class LinkProbed(Message):
    """A probe has come."""

    number: Count


class HostMeasured(Message):
    """What the job costs on this host."""

    profile: JobProfile | None
    """None: it cannot be measured."""
    memory: Bytes
    """What can still be had here."""


class HostReady(Message):
    """Its workers have started."""

    workers: Workers


class HostPaused(Message):
    """Its workers are at rest."""

    generation: Count
    status: HostStatus


class ExchangeTrouble(Message):
    """It cannot go on in this generation of hosts."""

    generation: Count
    other: Label
    """The host that it has lost; none if its own state is to blame."""
    why: Text


class StepRecorded(Message):
    """What it has computed in a step."""

    step: Step
    digest: StepDigest


class EventForwarded(Message):
    """An event for the run's record."""

    name: Label
    fields: Plain

    def __post_init__(self) -> None:
        check_plain(self.fields)
        if self.name not in AGENT_EVENTS:
            raise ValueError("an event that is not an agent's to tell of")
        if RESERVED & self.fields.keys():
            raise ValueError(f"an event with a field of the master's: {', '.join(RESERVED)}")


class Recovered(Message):
    """Workers have been replaced, and steps committed again."""

    recoveries: Annotated[list[Plain], msgspec.Meta(max_length=MAX_EVENTS)]

    def __post_init__(self) -> None:
        check_plain(self.recoveries)


class AgentFailed(Message):
    """It cannot take part, or not any more."""

    error: ErrorMessage
    step: Step


class BatchChunk(Message):
    """A part of what it has made of a held-out batch."""

    round: Step
    batch: Count
    chunk: Annotated[int, msgspec.Meta(ge=0, lt=MAX_CHUNKS)]
    chunks: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHUNKS)]
    text: Annotated[str, msgspec.Meta(max_length=CHUNK_CHARACTERS)]


# From the master.


class LinkProbe(Message):
    """Say that this has come."""

    number: Count
    content: Annotated[bytes, msgspec.Meta(max_length=PROBE_BYTES)]


class MeasureHost(Message):
    """Measure what the job costs there, by this plan."""

    plan: Plain
    job: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{32}\Z")]
    """The digest under which the profile is kept."""
    all_sizes: bool
    """Whether other sizes of shards than the job's own are wanted, too."""

    def __post_init__(self) -> None:
        check_plain(self.plan)


class PlanAssigned(Message):
    """Set up memory for this plan, and start workers."""

    plan: Plain

    def __post_init__(self) -> None:
        check_plain(self.plan)


class HostRefused(Message):
    """This host may not take part."""

    error: ErrorMessage


class PauseWorkers(Message):
    """Come to rest: another generation of hosts begins."""

    generation: Count


class ResumeWorkers(Message):
    """Go on in this way."""

    order: RegroupOrder
    lease: Step
    told: Annotated[tuple[tuple[Step, float], ...], msgspec.Meta(max_length=1 << 20)] = ()
    """What the task's schedule has been told, where it waits for a metric."""


class LeaseExtended(Message):
    """Run every step before this one."""

    step: Step


class MetricEvaluated(Message):
    """Tell the task's schedule the metric that it waits for."""

    told: tuple[Step, float]
    """After how many steps it was evaluated, and what it is."""


class InferBatches(Message):
    """Evaluate held-out batches, or predict them, when all rest after this step."""

    what: Literal["evaluate", "predict"]
    round: Step
    step: Step
    batches: Annotated[list[Count], msgspec.Meta(max_length=1 << 20)]


class SendState(Message):
    """Give the part of the state that this host alone has, when all rest after this step."""

    step: Step


class JobEnded(Message):
    """The job has ended."""


FromAgent = (
    HostPresent
    | LinkProbed
    | HostMeasured
    | HostReady
    | HostPaused
    | ExchangeTrouble
    | StepRecorded
    | EventForwarded
    | Recovered
    | AgentFailed
    | BatchChunk
)
FromMaster = (
    LinkProbe
    | MeasureHost
    | PlanAssigned
    | HostRefused
    | PauseWorkers
    | ResumeWorkers
    | LeaseExtended
    | MetricEvaluated
    | InferBatches
    | SendState
    | JobEnded
)
FROM_AGENTS: Codec[Message] = Codec(FromAgent | LINK_KINDS)
"""What a master understands."""
FROM_MASTER: Codec[Message] = Codec(FromMaster | LINK_KINDS)
"""What an agent understands."""
