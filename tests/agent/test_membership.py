"""Membership: event lists, and a shell of simulated workers under random events.

`Shell` stands for the coordinator and its processes: it carries out what `decide` commands and
checks every command against what the workers really do.
"""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.agent.membership import (
    MAX_FAILED_STARTS,
    Command,
    DismissWorker,
    Event,
    ForkFailed,
    ForkRetried,
    FormGroup,
    GiveUp,
    GroupStarted,
    RaiseEpoch,
    SpawnWorker,
    Status,
    TargetChanged,
    WorkerCorrupted,
    WorkerDied,
    WorkerMembership,
    WorkerReady,
    WorkerRested,
    WorkersResumed,
    decide,
)

STARTING, READY, WORKING, RESTING, LEAVING = "starting", "ready", "working", "resting", "leaving"


class Shell:
    """Simulated workers by seat, and the machine that decides about them."""

    def __init__(self, target: int, max_workers: int) -> None:
        self.members = WorkerMembership(target=target, max_workers=max_workers)
        self.workers: dict[int, str] = {}
        self.epoch_raised = False
        """Whether the workers at work will rest at their next barrier."""
        self.failed_starts = 0
        self.gave_up = False

    def hear(self, event: Event) -> tuple[Command, ...]:
        """Something happened: let the machine decide, and carry out what it commands."""
        self._happened(event)
        before = copy.deepcopy(self.members)
        asked = self.members
        self.members, commands, reason = decide(self.members, event)
        assert asked == before, "the machine is pure: it leaves its argument as it was"
        assert reason, "every decision has a reason"
        for command in commands:
            self._carry_out(command)
        return commands

    def _happened(self, event: Event) -> None:
        match event:
            case WorkerReady(worker_id):
                assert self.workers[worker_id] == STARTING
                self.workers[worker_id] = READY
                self.failed_starts = 0
            case WorkerRested(worker_id):
                assert self.workers[worker_id] == WORKING
                self.workers[worker_id] = RESTING
            case WorkersResumed():
                self.workers = {
                    s: WORKING if was == RESTING else was for s, was in self.workers.items()
                }
            case WorkerDied(worker_id):
                self.failed_starts += self.workers.pop(worker_id) == STARTING
            case ForkFailed(worker_id):
                assert self.workers.pop(worker_id) == STARTING
                self.failed_starts += not self.workers

    def _carry_out(self, command: Command) -> None:
        match command:
            case SpawnWorker(worker_id):
                assert 0 <= worker_id < self.members.max_workers
                assert worker_id not in self.workers, f"seat {worker_id} is taken"
                self.workers[worker_id] = STARTING
            case RaiseEpoch():
                assert not self.epoch_raised, "the epoch is raised once for each new membership"
                self.epoch_raised = True
            case FormGroup(worker_ids):
                assert WORKING not in self.workers.values(), "somebody works"
                assert worker_ids
                assert len(set(worker_ids)) == len(worker_ids) <= self.members.target
                for worker_id in worker_ids:
                    assert self.workers[worker_id] in (READY, RESTING)
                    self.workers[worker_id] = WORKING
                assert RESTING not in self.workers.values(), "somebody is left behind"
                self.epoch_raised = False
            case DismissWorker(worker_id):
                assert self.workers[worker_id] in (READY, RESTING)
                self.workers[worker_id] = LEAVING
            case GiveUp():
                assert self.failed_starts >= MAX_FAILED_STARTS
                self.gave_up = True

    def having(self, *states: str) -> list[int]:
        return sorted(worker_id for worker_id, state in self.workers.items() if state in states)

    def pending(self) -> list[Event]:
        """What is bound to happen if nothing else does, all of it at once."""
        events: list[Event] = [WorkerReady(worker_id) for worker_id in self.having(STARTING)]
        events += [WorkerDied(worker_id) for worker_id in self.having(LEAVING)]
        if self.epoch_raised:
            events += [WorkerRested(worker_id) for worker_id in self.having(WORKING)]
        elif self.having(RESTING):  # at the lease's end, where the others will come as well
            events += [WorkerRested(worker_id) for worker_id in self.having(WORKING)] or [
                WorkersResumed()
            ]
        return events

    def settle(self) -> None:
        """Let everything happen that is bound to, in an order that does not matter."""
        for _ in range(10 * self.members.max_workers + 10):
            pending = self.pending()
            if not pending or self.gave_up:
                return
            self.hear(pending[0])
        raise AssertionError(f"no end: {self.members}")


def shell_of(workers: int, max_workers: int | None = None) -> Shell:
    """A shell whose first membership has formed."""
    shell = Shell(workers, max_workers or workers)
    shell.hear(GroupStarted())
    shell.settle()
    return shell


def commands_of(shell: Shell, *events: Event) -> list[Command]:
    return [command for event in events for command in shell.hear(event)]


# Event lists.


def test_everybody_is_there_before_the_first_membership() -> None:
    shell = Shell(3, 3)
    assert shell.hear(GroupStarted()) == (SpawnWorker(0), SpawnWorker(1), SpawnWorker(2))
    assert commands_of(shell, WorkerReady(2), WorkerReady(0)) == []
    assert commands_of(shell, WorkerReady(1)) == [FormGroup((0, 1, 2))]


def test_a_worker_that_dies_before_the_first_membership_is_awaited() -> None:
    shell = Shell(2, 2)
    commands_of(shell, GroupStarted(), WorkerReady(0))
    assert commands_of(shell, WorkerDied(1)) == [SpawnWorker(1)]
    assert commands_of(shell, WorkerDied(0), WorkerReady(0)) == [SpawnWorker(0)]
    assert commands_of(shell, WorkerReady(1)) == [FormGroup((0, 1))]


def test_survivors_go_on_at_once_and_the_replacement_joins_later() -> None:
    shell = shell_of(3)
    assert commands_of(shell, WorkerDied(1)) == [RaiseEpoch()]
    assert commands_of(shell, WorkerRested(0)) == []
    assert commands_of(shell, WorkerRested(2)) == [FormGroup((0, 2)), SpawnWorker(1)]
    assert commands_of(shell, WorkerReady(1)) == [RaiseEpoch()]
    assert commands_of(shell, WorkerRested(2), WorkerRested(0)) == [FormGroup((0, 1, 2))]


def test_a_death_during_a_regroup_shortens_the_wait() -> None:
    shell = shell_of(3)
    commands_of(shell, WorkerDied(1), WorkerRested(0))
    assert commands_of(shell, WorkerDied(2)) == [FormGroup((0,)), SpawnWorker(1), SpawnWorker(2)]


def test_a_death_at_rest_is_made_up_for_at_once() -> None:
    shell = shell_of(3)
    commands_of(shell, WorkerRested(0), WorkerRested(1), WorkerRested(2))
    assert commands_of(shell, WorkerDied(0)) == [RaiseEpoch(), FormGroup((1, 2)), SpawnWorker(0)]


def test_all_die_at_once() -> None:
    shell = shell_of(3)
    assert commands_of(shell, WorkerDied(0), WorkerDied(1)) == [RaiseEpoch()]
    assert commands_of(shell, WorkerDied(2)) == [SpawnWorker(0), SpawnWorker(1), SpawnWorker(2)]
    assert commands_of(shell, WorkerReady(1)) == [FormGroup((1,))]
    shell.settle()
    assert shell.members.formed == (0, 1, 2)


def test_the_only_worker_dies() -> None:
    shell = shell_of(1)
    assert commands_of(shell, WorkerDied(0)) == [RaiseEpoch(), SpawnWorker(0)]
    assert commands_of(shell, WorkerReady(0)) == [FormGroup((0,))]


def test_a_replacement_that_dies_is_replaced() -> None:
    shell = shell_of(2)
    commands_of(shell, WorkerDied(1), WorkerRested(0))
    assert commands_of(shell, WorkerDied(1)) == [SpawnWorker(1)]
    commands_of(shell, WorkerReady(1))  # everybody is to rest
    assert commands_of(shell, WorkerDied(1)) == [SpawnWorker(1)]
    assert commands_of(shell, WorkerRested(0)) == [FormGroup((0,))]
    shell.settle()
    assert shell.members.formed == (0, 1)


def test_more_workers_are_wanted() -> None:
    shell = shell_of(1, max_workers=3)
    assert commands_of(shell, TargetChanged(3)) == [SpawnWorker(1), SpawnWorker(2)]
    assert commands_of(shell, WorkerReady(2)) == [RaiseEpoch()]
    assert commands_of(shell, WorkerRested(0)) == [FormGroup((0, 2))]
    assert commands_of(shell, WorkerReady(1), WorkerRested(0), WorkerRested(2)) == [
        RaiseEpoch(),
        FormGroup((0, 1, 2)),
    ]


def test_fewer_workers_are_wanted() -> None:
    shell = shell_of(3)
    assert commands_of(shell, TargetChanged(2)) == [RaiseEpoch()]
    assert commands_of(shell, WorkerRested(0), WorkerRested(1)) == []
    assert commands_of(shell, WorkerRested(2)) == [DismissWorker(2), FormGroup((0, 1))]
    assert commands_of(shell, WorkerDied(2)) == []


def test_as_many_as_there_are_changes_nothing() -> None:
    shell = shell_of(2)
    assert commands_of(shell, TargetChanged(2)) == []


@pytest.mark.parametrize(("asked", "given"), [(0, 1), (-3, 1), (9, 3)])
def test_the_target_stays_between_one_and_the_seats(asked: int, given: int) -> None:
    shell = shell_of(2, max_workers=3)
    commands_of(shell, TargetChanged(asked))
    shell.settle()
    assert len(shell.members.formed) == shell.members.target == given


def test_it_gives_up_when_nobody_can_be_started() -> None:
    shell = shell_of(2)
    commands_of(shell, WorkerDied(1), WorkerRested(0))
    for _ in range(MAX_FAILED_STARTS - 1):
        assert commands_of(shell, WorkerDied(1)) == [SpawnWorker(1)]
    assert commands_of(shell, WorkerDied(1)) == [GiveUp()]


def test_a_start_that_succeeds_forgives_those_that_failed() -> None:
    shell = shell_of(2)
    for _ in range(3):
        commands_of(shell, WorkerDied(1), WorkerRested(0))
        for _ in range(MAX_FAILED_STARTS - 1):
            commands_of(shell, WorkerDied(1))
        shell.settle()
    assert shell.members.formed == (0, 1)
    assert not shell.gave_up


def test_those_sent_home_are_not_failed_starts() -> None:
    workers = MAX_FAILED_STARTS + 1
    shell = shell_of(workers)
    commands_of(shell, TargetChanged(1))
    shell.settle()
    assert not shell.gave_up
    assert shell.members.formed == (0,)


def test_all_rest_and_go_on_when_the_state_was_found_changed() -> None:
    shell = shell_of(2)
    assert commands_of(shell, WorkerCorrupted(1), WorkerCorrupted(0)) == [RaiseEpoch()]
    assert commands_of(shell, WorkerRested(1), WorkerRested(0)) == [FormGroup((0, 1))]


def test_a_seat_is_free_only_when_its_worker_has_left() -> None:
    shell = shell_of(2)
    commands_of(shell, TargetChanged(1), WorkerRested(0), WorkerRested(1))
    commands_of(shell, TargetChanged(2))  # worker 1 is still on its way out
    shell.settle()
    assert shell.members.formed == (0, 1)


def test_one_who_rests_is_not_called_to_rest_again() -> None:
    shell = shell_of(2)
    commands_of(shell, WorkerRested(0))
    assert commands_of(shell, WorkerDied(1)) == [RaiseEpoch(), FormGroup((0,)), SpawnWorker(1)]


# Random events.


def possible(shell: Shell) -> list[Event]:
    """All that could happen next."""
    events: list[Event] = [WorkerReady(worker_id) for worker_id in shell.having(STARTING)]
    events += [WorkerRested(worker_id) for worker_id in shell.having(WORKING)]
    events += [WorkerDied(worker_id) for worker_id in shell.workers]
    events += [WorkerCorrupted(worker_id) for worker_id in shell.having(WORKING)]
    if shell.having(RESTING) and not shell.epoch_raised:
        events.append(WorkersResumed())
    return [*events, *map(TargetChanged, range(-1, shell.members.max_workers + 2))]


def check_books(shell: Shell) -> None:
    """The machine knows what every worker does, and there is always something that will happen."""
    known = {worker_id: status.value for worker_id, status in shell.members.status.items()}
    staying = {worker_id: state for worker_id, state in shell.workers.items() if state != LEAVING}
    assert {s: v for s, v in known.items() if shell.workers.get(s) != LEAVING} == staying
    assert len(shell.workers) <= shell.members.max_workers
    assert 1 <= shell.members.target <= shell.members.max_workers
    if shell.epoch_raised:
        assert shell.members.regrouping, "workers rest, and nobody will tell them to go on"
    assert shell.pending() or shell.having(WORKING), "nothing will ever happen"


@settings(max_examples=400)
@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(0, 10**6), max_size=40))
def test_random_events(max_workers: int, target: int, choices: list[int]) -> None:
    """Workers start, rest, die and leave in any order, and the number wanted changes."""
    shell = Shell(min(target, max_workers), max_workers)
    shell.hear(GroupStarted())
    for choice in choices:
        events = possible(shell)
        shell.hear(events[choice % len(events)])
        if shell.gave_up:
            return
        check_books(shell)
    shell.settle()
    members = shell.members
    if not shell.gave_up:
        assert len(members.formed) == members.target
        assert shell.having(WORKING) == sorted(members.formed)
        assert dict(members.status) == dict.fromkeys(members.formed, Status.WORKING)


# Workers that cannot be forked.


def test_the_others_go_on_without_a_worker_that_cannot_be_forked() -> None:
    shell = shell_of(3)
    commands_of(shell, WorkerDied(1), WorkerRested(0))
    assert commands_of(shell, WorkerRested(2)) == [FormGroup((0, 2)), SpawnWorker(1)]
    assert commands_of(shell, ForkFailed(1)) == []
    assert commands_of(shell, WorkerDied(0), WorkerRested(2)) == [RaiseEpoch(), FormGroup((2,))]
    assert commands_of(shell, ForkRetried()) == [SpawnWorker(0), SpawnWorker(1)]
    assert commands_of(shell, ForkFailed(0), ForkFailed(1), ForkRetried(), WorkerReady(0)) == [
        SpawnWorker(0),
        SpawnWorker(1),
        RaiseEpoch(),
    ]


def test_a_run_begins_with_those_that_can_be_forked() -> None:
    shell = Shell(2, 2)
    assert commands_of(shell, GroupStarted()) == [SpawnWorker(0), SpawnWorker(1)]
    assert commands_of(shell, ForkFailed(1)) == []
    assert commands_of(shell, WorkerReady(0)) == [FormGroup((0,))]


def test_with_nobody_it_is_tried_a_few_times() -> None:
    shell = Shell(1, 1)
    commands_of(shell, GroupStarted())
    for _ in range(MAX_FAILED_STARTS - 1):
        assert commands_of(shell, ForkFailed(0), ForkRetried()) == [SpawnWorker(0)]
    assert commands_of(shell, ForkFailed(0)) == [GiveUp()]
