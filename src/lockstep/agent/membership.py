"""Worker membership: who works, who joins, who is replaced. Pure; `worker_group` is its shell.

    decide(members, event) -> (members, commands, reason)

A membership changes in three moves: the epoch is raised (`RaiseEpoch`), the workers come to rest at
their next barrier, and when all of them rest the new membership is formed (`FormGroup`) from those
that rest and those that have joined in the meantime. Deaths on the way only shorten the wait.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

MAX_FAILED_STARTS = 5
"""Workers that die one after the other before they have said a word: then the run gives up."""


class Status(enum.Enum):
    """What a live worker is doing, as far as its agent knows."""

    STARTING = "starting"
    READY = "ready"
    WORKING = "working"
    RESTING = "resting"
    LEAVING = "leaving"


@dataclass(frozen=True, kw_only=True)
class WorkerMembership:
    """The state of the membership."""

    target: int
    """How many workers there shall be."""
    max_workers: int
    """How many there can be."""
    status: Mapping[int, Status] = field(default_factory=dict)
    """Live workers, by worker id."""
    formed: tuple[int, ...] = ()
    """The workers of the membership in force, in rank order; some may have died since."""
    regrouping: bool = True
    """Whether a new membership has to be formed before anybody works on."""
    held: bool = False
    """Whether the workers stay at rest until `ResumeRequested`: the hosts are being regrouped."""
    failed_starts: int = 0
    blocked: bool = False
    """Whether workers cannot be forked for now, for lack of processes, memory or descriptors."""

    def having(self, *wanted: Status) -> tuple[int, ...]:
        """The workers with one of these statuses, in order."""
        return tuple(
            worker_id for worker_id, status in sorted(self.status.items()) if status in wanted
        )

    @property
    def staying(self) -> int:
        """How many live workers have not been sent home."""
        return len(self.status) - len(self.having(Status.LEAVING))

    @property
    def all_rest(self) -> bool:
        """Whether nobody works."""
        return not self.having(Status.WORKING)

    @property
    def complete(self) -> bool:
        """Whether nobody works and a membership could be formed: at the start, of everybody."""
        there = self.having(Status.RESTING, Status.READY)
        waiting = not self.formed and self.having(Status.STARTING)
        return self.all_rest and bool(there) and not waiting


# Events.


@dataclass(frozen=True)
class GroupStarted:
    """The run begins."""


@dataclass(frozen=True)
class WorkerReady:
    """A worker has started, and computes the right bits."""

    worker_id: int


@dataclass(frozen=True)
class WorkerRested:
    """A worker has come to rest, at the lease's end or at a barrier."""

    worker_id: int


@dataclass(frozen=True)
class WorkersResumed:
    """The workers at rest have been told to go on as they are."""


@dataclass(frozen=True)
class WorkerDied:
    """A worker's process has ended."""

    worker_id: int


@dataclass(frozen=True)
class ForkFailed:
    """The system does not let this worker be forked."""

    worker_id: int


@dataclass(frozen=True)
class ForkRetried:
    """Forking may be tried again."""


@dataclass(frozen=True)
class TargetChanged:
    """Another number of workers is wanted."""

    workers: int


@dataclass(frozen=True)
class WorkerCorrupted:
    """A worker has found the state changed in memory, and has left its step."""

    worker_id: int


@dataclass(frozen=True)
class PauseRequested:
    """The hosts are being regrouped: everybody is to come to rest, and stay there."""


@dataclass(frozen=True)
class RegroupDeferred:
    """What was to be formed just now cannot be: the state is not in order. Nobody was told."""


@dataclass(frozen=True)
class ResumeRequested:
    """The hosts are regrouped and the state is in order: a membership may be formed."""


Event = (
    GroupStarted
    | WorkerReady
    | WorkerRested
    | WorkersResumed
    | WorkerDied
    | ForkFailed
    | ForkRetried
    | TargetChanged
    | WorkerCorrupted
    | PauseRequested
    | RegroupDeferred
    | ResumeRequested
)


# Commands.


@dataclass(frozen=True)
class SpawnWorker:
    """Start a worker with this id."""

    worker_id: int


@dataclass(frozen=True)
class RaiseEpoch:
    """Raise the epoch: workers come to rest at their next barrier."""


@dataclass(frozen=True)
class FormGroup:
    """Everybody rests: put the state in order and let these workers go on, in rank order."""

    worker_ids: tuple[int, ...]


@dataclass(frozen=True)
class DismissWorker:
    """Send this worker home."""

    worker_id: int


@dataclass(frozen=True)
class GiveUp:
    """Workers cannot be started."""


Command = SpawnWorker | RaiseEpoch | FormGroup | DismissWorker | GiveUp
Decision = tuple[WorkerMembership, tuple[Command, ...], str]


def decide(members: WorkerMembership, event: Event) -> Decision:
    """The next state, what to do, and why."""
    match event:
        case GroupStarted():
            return _fill(members, f"{members.target} workers are wanted")
        case WorkerReady(worker_id):
            return _hello(members, worker_id)
        case WorkerRested(worker_id):
            return _form_if_at_rest(
                _with(members, worker_id, Status.RESTING), f"worker {worker_id} rests"
            )
        case WorkersResumed():
            working = {
                worker_id: Status.WORKING if now is Status.RESTING else now
                for worker_id, now in members.status.items()
            }
            return replace(members, status=working), (), "the lease was extended"
        case WorkerDied(worker_id):
            return _died(members, worker_id)
        case ForkFailed(worker_id):
            return _fork_failed(members, worker_id)
        case ForkRetried():
            return _fill(replace(members, blocked=False), "it is tried again")
        case TargetChanged(workers):
            return _target(members, workers)
        case WorkerCorrupted(worker_id):
            return _regroup(members, f"worker {worker_id} found the state changed in memory")
        case PauseRequested():
            return _regroup(replace(members, held=True), "the hosts are being regrouped")
        case RegroupDeferred():
            status: dict[int, Status] = {
                worker_id: Status.RESTING if now is Status.WORKING else now
                for worker_id, now in members.status.items()
            }
            members = replace(members, status=status, regrouping=True, held=True)
            return members, (), "the state is not in order"
        case ResumeRequested():
            return _form_if_at_rest(replace(members, held=False), "the hosts are regrouped")


def _with(members: WorkerMembership, worker_id: int, status: Status | None) -> WorkerMembership:
    changed = {other: now for other, now in members.status.items() if other != worker_id}
    if status is not None:
        changed[worker_id] = status
    return replace(members, status=changed)


def _hello(members: WorkerMembership, worker_id: int) -> Decision:
    members = replace(_with(members, worker_id, Status.READY), failed_starts=0)
    reason = f"worker {worker_id} is ready to join"
    if members.regrouping:
        return _form_if_at_rest(members, reason)
    return _regroup(members, reason)


def _died(members: WorkerMembership, worker_id: int) -> Decision:
    was = members.status.get(worker_id)
    members = _with(members, worker_id, None)
    reason = f"worker {worker_id} died while {was.value if was else 'away'}"
    if was in (Status.STARTING, None):
        members = replace(members, failed_starts=members.failed_starts + 1)
        if members.failed_starts >= MAX_FAILED_STARTS:
            return members, (GiveUp(),), f"{reason}, the {members.failed_starts}th in a row"
    if was not in (Status.WORKING, Status.RESTING):
        members, spawned, _ = _fill(members, reason)
        members, commands, reason = _form_if_at_rest(members, reason)
        return members, (*spawned, *commands), reason
    return _regroup(members, reason)


def _fork_failed(members: WorkerMembership, worker_id: int) -> Decision:
    """Go on with those that there are; with nobody, give up after some tries."""
    members = replace(_with(members, worker_id, None), blocked=True)
    reason = f"worker {worker_id} could not be forked"
    if not members.status:
        members = replace(members, failed_starts=members.failed_starts + 1)
        if members.failed_starts >= MAX_FAILED_STARTS:
            return members, (GiveUp(),), f"{reason}, and there is no other"
        return members, (), reason
    return _form_if_at_rest(members, reason)


def _target(members: WorkerMembership, workers: int) -> Decision:
    workers = max(1, min(workers, members.max_workers))
    members = replace(members, target=workers)
    live = members.staying
    reason = f"{workers} workers are wanted, {live} are there"
    if live < workers:
        return _fill(members, reason)
    if live > workers:
        return _regroup(members, reason)
    return members, (), reason


def _regroup(members: WorkerMembership, reason: str) -> Decision:
    """Bring everybody to rest, if it is not under way."""
    raised: tuple[Command, ...] = () if members.regrouping else (RaiseEpoch(),)
    members, commands, reason = _form_if_at_rest(replace(members, regrouping=True), reason)
    return members, (*raised, *commands), reason


def _form_if_at_rest(members: WorkerMembership, reason: str) -> Decision:
    """Form the next membership if one is due and nobody works.

    It is not formed before somebody can be in it; at the start, not before everybody is.
    """
    if not members.regrouping or not members.all_rest:
        return members, (), reason
    there = members.having(Status.RESTING, Status.READY)
    if members.held or not members.complete:
        members, spawned, _ = _fill(members, reason)
        return members, spawned, f"{reason}; waiting for {_what(members)}"
    formed, extra = there[: members.target], there[members.target :]
    status = {**members.status, **dict.fromkeys(formed, Status.WORKING)}
    status |= dict.fromkeys(extra, Status.LEAVING)
    members = replace(members, status=status, formed=formed, regrouping=False)
    dismissed = tuple(DismissWorker(worker_id) for worker_id in extra)
    members, spawned, _ = _fill(members, reason)
    return members, (*dismissed, FormGroup(formed), *spawned), reason


def _what(members: WorkerMembership) -> str:
    return "the hosts" if members.held else "workers to start"


def _fill(members: WorkerMembership, reason: str) -> Decision:
    """Start as many workers as are missing, with free ids, unless none can be started for now."""
    if members.blocked:
        return members, (), reason
    missing = members.target - members.staying
    free = [
        worker_id for worker_id in range(members.max_workers) if worker_id not in members.status
    ]
    worker_ids = free[: max(missing, 0)]
    for worker_id in worker_ids:
        members = _with(members, worker_id, Status.STARTING)
    return members, tuple(SpawnWorker(worker_id) for worker_id in worker_ids), reason
