"""Event schema: the lines of a run's `events.jsonl`, and of its `live.json`, as typed structs.

A line is a JSON object with `time` (UTC, ISO 8601, milliseconds) and `event`, which says what
happened and so which fields there are. The docstring of each struct is its row in docs/events.md.
Fields are added, and never renamed or dropped: `STREAM` is raised where a reader has to know.
Every field has a default, since older runs lack some. Readers take what they do not know as
`Unknown`.
"""

from __future__ import annotations

from typing import Any, dataclass_transform

import msgspec

STREAM = 1
"""The version of this schema, which `began` has."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Event(msgspec.Struct, kw_only=True, frozen=True, tag_field="event", omit_defaults=True):
    """Base of all events."""

    time: str = ""
    host: str | None = None
    """The host that it is about; for an event of a worker, None is the host of the master."""


class Began(Event, tag="began"):
    """A master has begun, or gone on with, the run: its process (`started` is the kernel's start
    time of it), its command line, and how many parameters the model has."""

    stream: int = STREAM
    pid: int = 0
    started: int = 0
    command: list[str] = []
    parameters: int | None = None


class Resumed(Event, tag="resumed"):
    """The run goes on from the state after this step. Later steps are made again."""

    step: int = 0


class Note(Event, tag="note"):
    """Something that is worth knowing about the run."""

    text: str = ""


class Planned(Event, tag="plan"):
    """The way that was chosen to run the job, out of `considered`: the seconds of a step that were
    `predicted`, of which `parts`, those `measured` in a trial (null: there was none), and the bytes
    of `memory` by host. `planning` seconds were spent on it."""

    chosen: str = ""
    workers: int = 0
    considered: int = 0
    predicted: float | None = None
    parts: dict[str, float] = {}
    measured: float | None = None
    memory: dict[str, int] = {}
    planning: float = 0.0


class FirstStep(Event, tag="first_step"):
    """The first step has been committed."""


class Progressed(Event, tag="progressed"):
    """Steps have been committed: `steps` of them in `seconds`, of `samples` samples in all, up to
    the state after `step`. `loss`, `low` and `high` are the mean, the least and the largest loss of
    these steps, `norm` the mean of their gradient norms where there is a limit, `lr` the learning
    rate of the optimizer's first group at the last of them."""

    step: int = 0
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    loss: float | None = None
    low: float | None = None
    high: float | None = None
    norm: float | None = None
    lr: float | None = None
    workers: int = 0


class Seconds(msgspec.Struct, array_like=True, frozen=True):
    """What a worker has spent its time on, in seconds: `[compute, data, wait, reduce, exchange,
    update, evaluate]`."""

    compute: float = 0.0
    data: float = 0.0
    wait: float = 0.0
    reduce: float = 0.0
    exchange: float = 0.0
    update: float = 0.0
    evaluate: float = 0.0


class Timed(Event, tag="timed"):
    """What the workers of a host have spent the last `seconds` on, by worker: seconds, as
    `[compute, data, wait, reduce, exchange, update, evaluate]`. `memory` is how many bytes each
    has of its own at the end of it: resident, without the state that all workers share."""

    seconds: float = 0.0
    workers: dict[int, Seconds] = {}
    memory: dict[int, int] = {}


class Baseline(Event, tag="baseline"):
    """The metrics of a trivial predictor."""

    metrics: dict[str, float | None] = {}


class Evaluated(Event, tag="evaluated"):
    """Held-out metrics after a step; null where one is not finite."""

    step: int = 0
    data_epoch: int = 0
    metrics: dict[str, float | None] = {}


class StoppedEarly(Event, tag="stopped_early"):
    """The job's metric has not improved for as many evaluations as it allows."""

    step: int = 0
    reason: str = ""


class CallbackNoted(Event, tag="callback"):
    """A callback has failed and hears no more, or has missed steps."""

    note: str = ""


class Requested(Event, tag="request"):
    """Somebody has asked for something: `scale` (to `number` workers), `checkpoint`, `pause`,
    `go_on`, `stop`."""

    request: str = ""
    number: int = 0


class Paused(Event, tag="paused"):
    """All workers rest after this step, as asked."""

    step: int = 0


class WentOn(Event, tag="went_on"):
    """They go on."""

    step: int = 0


class Checkpointed(Event, tag="checkpoint"):
    """A checkpoint has been written; it took so many seconds, in the background."""

    step: int = 0
    path: str = ""
    seconds: float = 0.0


class CheckpointFailed(Event, tag="checkpoint_failed"):
    """A checkpoint could not be written; training goes on."""

    step: int = 0
    error: str = ""


class Spawned(Event, tag="spawned"):
    """A worker has been forked."""

    worker: int = 0
    pid: int = 0
    reason: str = ""


class ForkFailed(Event, tag="fork_failed"):
    """A worker could not be forked; it is tried again."""

    worker: int = 0
    why: str = ""


class Joined(Event, tag="joined"):
    """A worker is ready; `probe` is a digest of what its arithmetic gives."""

    worker: int = 0
    pid: int = 0
    probe: str = ""


class Formed(Event, tag="formed"):
    """The workers of a host (`seats`) go on together, from the state after this step."""

    seats: list[int] = []
    step: int = 0
    reason: str = ""


class Regroup(Event, tag="regroup"):
    """The workers of a host stop at their next meeting, since the membership changes."""

    epoch: int = 0
    reason: str = ""


class Dismissed(Event, tag="dismissed"):
    """A worker has been sent home."""

    worker: int = 0
    reason: str = ""


class Died(Event, tag="died"):
    """A worker has died: where it was (step, phase, shard or held-out batch), and of what."""

    worker: int = 0
    pid: int = 0
    step: int = 0
    phase: str = ""
    shard: int | None = None
    batch: int | None = None
    how: str = ""
    status: str | None = None


class Stalled(Event, tag="stalled"):
    """A worker has shown no heartbeat, and is killed; `stack` is where it was in Python."""

    worker: int = 0
    pid: int = 0
    step: int = 0
    phase: str = ""
    shard: int | None = None
    batch: int | None = None
    reason: str = ""
    state: str = ""
    stack: str = ""


class Recovered(Event, tag="recovered"):
    """A step has been committed after a death: milliseconds until the death was noticed, until the
    others were regrouped, and until the step; shards computed again, steps rolled back. `worker` is
    null where a host was lost."""

    worker: int | None = None
    pid: int = 0
    step: int = 0
    phase: str = ""
    shard: int | None = None
    batch: int | None = None
    how: str = ""
    detection_ms: float = 0.0
    regroup_ms: float = 0.0
    recovery_ms: float = 0.0
    recomputed: int = 0
    steps_back: int = 0


class LostLoader(Event, tag="lost_loader"):
    """A worker ends since one of its loader processes has died."""

    worker: int = 0
    pid: int = 0


class Corrupt(Event, tag="corrupt"):
    """An audit has found a gradient (`shard`) or the state (`tensor`, `elements`) changed."""

    worker: int = 0
    step: int = 0
    shard: int | None = None
    tensor: str | None = None
    elements: list[int] = []


class Traced(Event, tag="traced"):
    """A worker has compared its shards as one list of kernels with the plain pass: in so many forms
    they are run in that way from then on, or `why_not`."""

    worker: int = 0
    forms: int = 0
    why_not: str = ""
    native: bool = False
    why_not_native: str = ""


class Native(Event, tag="native"):
    """A worker meets, sums and updates without the interpreter from now on, or `why_not`."""

    worker: int = 0
    why_not: str = ""


class Hosts(Event, tag="hosts"):
    """The hosts of the job pause, or go on (`going_on`), as a new generation."""

    generation: int = 0
    reason: str = ""
    hosts: list[str] = []
    going_on: bool = False


class HostLost(Event, tag="host_lost"):
    """A host takes no part any more."""

    why: str = ""


class Regrouped(Event, tag="regrouped"):
    """The hosts have committed a step again, after so many milliseconds."""

    generation: int = 0
    stalled_ms: float = 0.0


class Connection(Event, tag="connection"):
    """A connection was refused or lost."""

    peer: str = ""
    why: str = ""


class Refused(Event, tag="refused"):
    """A host may not take part."""

    why: str = ""


class Failed(Event, tag="failed"):
    """An error of the user's code, or of a host, at this step."""

    step: int = 0
    error: str = ""


class NotSaved(Event, tag="not_saved"):
    """What failed could not be saved as a checkpoint: these tensors are not finite."""

    step: int = 0
    tensors: list[str] = []


class Faults(Event, tag="faults"):
    """How often each scripted fault has struck."""

    fired: list[int] = []


class Finished(Event, tag="finished"):
    """The run has its result."""

    steps: int = 0
    fingerprint: str = ""


class Ended(Event, tag="ended"):
    """The master has ended without a result: `how` is `stopped` or `failed`."""

    how: str = ""
    step: int = 0
    why: str = ""


class Verified(Event, tag="verified"):
    """`lockstep verify` has replayed the steps from `first` to before `last`, and they are equal;
    `final`: so is the final state."""

    first: int = 0
    last: int = 0
    workers: int = 0
    final: bool = False


class Unknown(Event, tag="unknown"):
    """An event of another version, or one whose fields are not as they should be."""

    name: str = ""
    fields: dict[str, Any] = {}


KINDS: tuple[type[Event], ...] = (
    Began, Resumed, Planned, FirstStep, Progressed, Timed, Baseline, Evaluated, StoppedEarly,
    CallbackNoted, Requested, Paused, WentOn, Checkpointed, CheckpointFailed, Spawned, ForkFailed,
    Joined, Formed, Regroup, Dismissed, Died,
    Stalled, Recovered, LostLoader, Corrupt, Traced, Native, Hosts, HostLost, Regrouped, Connection,
    Refused, Note, Failed, NotSaved, Faults, Finished, Ended, Verified,
)  # fmt: skip
"""All events that are written, in the order of the documentation."""
BY_NAME: dict[str, type[Event]] = {str(kind.__struct_config__.tag): kind for kind in KINDS}
_DECODERS = {name: msgspec.json.Decoder(kind) for name, kind in BY_NAME.items()}


class _Head(msgspec.Struct):
    event: str
    time: str = ""


_HEAD = msgspec.json.Decoder(_Head)


def name_of(event: Event) -> str:
    """The name of an event, as its line has it."""
    return event.name if isinstance(event, Unknown) else str(event.__struct_config__.tag)


def parse_event(line: bytes) -> Event | None:
    """The event in a line; None if the line is none, as where a crash has cut it."""
    try:
        head = _HEAD.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    decoder = _DECODERS.get(head.event)
    if decoder is not None:
        try:
            return decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            pass
    try:
        fields = msgspec.json.decode(line, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    fields.pop("time", None)
    fields.pop("event", None)
    return Unknown(time=head.time, name=head.event, fields=fields)
