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
    Begin,
    Command,
    Died,
    Dismiss,
    Event,
    Form,
    GiveUp,
    Hello,
    Regroup,
    Rested,
    Resumed,
    Spawn,
    Spoilt,
    Status,
    Target,
    WorkerMembership,
    decide,
)

STARTING, READY, WORKING, RESTING, LEAVING = "starting", "ready", "working", "resting", "leaving"


class Shell:
    """Simulated workers by seat, and the machine that decides about them."""

    def __init__(self, target: int, seats: int) -> None:
        self.members = WorkerMembership(target=target, seats=seats)
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
            case Hello(seat):
                assert self.workers[seat] == STARTING
                self.workers[seat] = READY
                self.failed_starts = 0
            case Rested(seat):
                assert self.workers[seat] == WORKING
                self.workers[seat] = RESTING
            case Resumed():
                self.workers = {
                    s: WORKING if was == RESTING else was for s, was in self.workers.items()
                }
            case Died(seat):
                self.failed_starts += self.workers.pop(seat) == STARTING

    def _carry_out(self, command: Command) -> None:
        match command:
            case Spawn(seat):
                assert 0 <= seat < self.members.seats
                assert seat not in self.workers, f"seat {seat} is taken"
                self.workers[seat] = STARTING
            case Regroup():
                assert not self.epoch_raised, "the epoch is raised once for each new membership"
                self.epoch_raised = True
            case Form(seats):
                assert WORKING not in self.workers.values(), "somebody works"
                assert seats
                assert len(set(seats)) == len(seats) <= self.members.target
                for seat in seats:
                    assert self.workers[seat] in (READY, RESTING)
                    self.workers[seat] = WORKING
                assert RESTING not in self.workers.values(), "somebody is left behind"
                self.epoch_raised = False
            case Dismiss(seat):
                assert self.workers[seat] in (READY, RESTING)
                self.workers[seat] = LEAVING
            case GiveUp():
                assert self.failed_starts >= MAX_FAILED_STARTS
                self.gave_up = True

    def having(self, *states: str) -> list[int]:
        return sorted(seat for seat, state in self.workers.items() if state in states)

    def pending(self) -> list[Event]:
        """What is bound to happen if nothing else does, all of it at once."""
        events: list[Event] = [Hello(seat) for seat in self.having(STARTING)]
        events += [Died(seat) for seat in self.having(LEAVING)]
        if self.epoch_raised:
            events += [Rested(seat) for seat in self.having(WORKING)]
        elif self.having(RESTING):  # at the lease's end, where the others will come as well
            events += [Rested(seat) for seat in self.having(WORKING)] or [Resumed()]
        return events

    def settle(self) -> None:
        """Let everything happen that is bound to, in an order that does not matter."""
        for _ in range(10 * self.members.seats + 10):
            pending = self.pending()
            if not pending or self.gave_up:
                return
            self.hear(pending[0])
        raise AssertionError(f"no end: {self.members}")


def shell_of(workers: int, seats: int | None = None) -> Shell:
    """A shell whose first membership has formed."""
    shell = Shell(workers, seats or workers)
    shell.hear(Begin())
    shell.settle()
    return shell


def commands_of(shell: Shell, *events: Event) -> list[Command]:
    return [command for event in events for command in shell.hear(event)]


# Event lists.


def test_everybody_is_there_before_the_first_membership() -> None:
    shell = Shell(3, 3)
    assert shell.hear(Begin()) == (Spawn(0), Spawn(1), Spawn(2))
    assert commands_of(shell, Hello(2), Hello(0)) == []
    assert commands_of(shell, Hello(1)) == [Form((0, 1, 2))]


def test_a_worker_that_dies_before_the_first_membership_is_awaited() -> None:
    shell = Shell(2, 2)
    commands_of(shell, Begin(), Hello(0))
    assert commands_of(shell, Died(1)) == [Spawn(1)]
    assert commands_of(shell, Died(0), Hello(0)) == [Spawn(0)]
    assert commands_of(shell, Hello(1)) == [Form((0, 1))]


def test_survivors_go_on_at_once_and_the_replacement_joins_later() -> None:
    shell = shell_of(3)
    assert commands_of(shell, Died(1)) == [Regroup()]
    assert commands_of(shell, Rested(0)) == []
    assert commands_of(shell, Rested(2)) == [Form((0, 2)), Spawn(1)]
    assert commands_of(shell, Hello(1)) == [Regroup()]
    assert commands_of(shell, Rested(2), Rested(0)) == [Form((0, 1, 2))]


def test_a_death_during_a_regroup_shortens_the_wait() -> None:
    shell = shell_of(3)
    commands_of(shell, Died(1), Rested(0))
    assert commands_of(shell, Died(2)) == [Form((0,)), Spawn(1), Spawn(2)]


def test_a_death_at_rest_is_made_up_for_at_once() -> None:
    shell = shell_of(3)
    commands_of(shell, Rested(0), Rested(1), Rested(2))
    assert commands_of(shell, Died(0)) == [Regroup(), Form((1, 2)), Spawn(0)]


def test_all_die_at_once() -> None:
    shell = shell_of(3)
    assert commands_of(shell, Died(0), Died(1)) == [Regroup()]
    assert commands_of(shell, Died(2)) == [Spawn(0), Spawn(1), Spawn(2)]
    assert commands_of(shell, Hello(1)) == [Form((1,))]
    shell.settle()
    assert shell.members.formed == (0, 1, 2)


def test_the_only_worker_dies() -> None:
    shell = shell_of(1)
    assert commands_of(shell, Died(0)) == [Regroup(), Spawn(0)]
    assert commands_of(shell, Hello(0)) == [Form((0,))]


def test_a_replacement_that_dies_is_replaced() -> None:
    shell = shell_of(2)
    commands_of(shell, Died(1), Rested(0))
    assert commands_of(shell, Died(1)) == [Spawn(1)]
    commands_of(shell, Hello(1))  # everybody is to rest
    assert commands_of(shell, Died(1)) == [Spawn(1)]
    assert commands_of(shell, Rested(0)) == [Form((0,))]
    shell.settle()
    assert shell.members.formed == (0, 1)


def test_more_workers_are_wanted() -> None:
    shell = shell_of(1, seats=3)
    assert commands_of(shell, Target(3)) == [Spawn(1), Spawn(2)]
    assert commands_of(shell, Hello(2)) == [Regroup()]
    assert commands_of(shell, Rested(0)) == [Form((0, 2))]
    assert commands_of(shell, Hello(1), Rested(0), Rested(2)) == [Regroup(), Form((0, 1, 2))]


def test_fewer_workers_are_wanted() -> None:
    shell = shell_of(3)
    assert commands_of(shell, Target(2)) == [Regroup()]
    assert commands_of(shell, Rested(0), Rested(1)) == []
    assert commands_of(shell, Rested(2)) == [Dismiss(2), Form((0, 1))]
    assert commands_of(shell, Died(2)) == []


def test_as_many_as_there_are_changes_nothing() -> None:
    shell = shell_of(2)
    assert commands_of(shell, Target(2)) == []


@pytest.mark.parametrize(("asked", "given"), [(0, 1), (-3, 1), (9, 3)])
def test_the_target_stays_between_one_and_the_seats(asked: int, given: int) -> None:
    shell = shell_of(2, seats=3)
    commands_of(shell, Target(asked))
    shell.settle()
    assert len(shell.members.formed) == shell.members.target == given


def test_it_gives_up_when_nobody_can_be_started() -> None:
    shell = shell_of(2)
    commands_of(shell, Died(1), Rested(0))
    for _ in range(MAX_FAILED_STARTS - 1):
        assert commands_of(shell, Died(1)) == [Spawn(1)]
    assert commands_of(shell, Died(1)) == [GiveUp()]


def test_a_start_that_succeeds_forgives_those_that_failed() -> None:
    shell = shell_of(2)
    for _ in range(3):
        commands_of(shell, Died(1), Rested(0))
        for _ in range(MAX_FAILED_STARTS - 1):
            commands_of(shell, Died(1))
        shell.settle()
    assert shell.members.formed == (0, 1)
    assert not shell.gave_up


def test_those_sent_home_are_not_failed_starts() -> None:
    workers = MAX_FAILED_STARTS + 1
    shell = shell_of(workers)
    commands_of(shell, Target(1))
    shell.settle()
    assert not shell.gave_up
    assert shell.members.formed == (0,)


def test_all_rest_and_go_on_when_the_state_was_found_changed() -> None:
    shell = shell_of(2)
    assert commands_of(shell, Spoilt(1), Spoilt(0)) == [Regroup()]
    assert commands_of(shell, Rested(1), Rested(0)) == [Form((0, 1))]


def test_a_seat_is_free_only_when_its_worker_has_left() -> None:
    shell = shell_of(2)
    commands_of(shell, Target(1), Rested(0), Rested(1))
    commands_of(shell, Target(2))  # worker 1 is still on its way out
    shell.settle()
    assert shell.members.formed == (0, 1)


def test_one_who_rests_is_not_called_to_rest_again() -> None:
    shell = shell_of(2)
    commands_of(shell, Rested(0))
    assert commands_of(shell, Died(1)) == [Regroup(), Form((0,)), Spawn(1)]


# Random events.


def possible(shell: Shell) -> list[Event]:
    """All that could happen next."""
    events: list[Event] = [Hello(seat) for seat in shell.having(STARTING)]
    events += [Rested(seat) for seat in shell.having(WORKING)]
    events += [Died(seat) for seat in shell.workers]
    events += [Spoilt(seat) for seat in shell.having(WORKING)]
    if shell.having(RESTING) and not shell.epoch_raised:
        events.append(Resumed())
    return [*events, *map(Target, range(-1, shell.members.seats + 2))]


def check_books(shell: Shell) -> None:
    """The machine knows what every worker does, and there is always something that will happen."""
    known = {seat: status.value for seat, status in shell.members.status.items()}
    staying = {seat: state for seat, state in shell.workers.items() if state != LEAVING}
    assert {s: v for s, v in known.items() if shell.workers.get(s) != LEAVING} == staying
    assert len(shell.workers) <= shell.members.seats
    assert 1 <= shell.members.target <= shell.members.seats
    if shell.epoch_raised:
        assert shell.members.regrouping, "workers rest, and nobody will tell them to go on"
    assert shell.pending() or shell.having(WORKING), "nothing will ever happen"


@settings(max_examples=400)
@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(0, 10**6), max_size=40))
def test_random_events(seats: int, target: int, choices: list[int]) -> None:
    """Workers start, rest, die and leave in any order, and the number wanted changes."""
    shell = Shell(min(target, seats), seats)
    shell.hear(Begin())
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
