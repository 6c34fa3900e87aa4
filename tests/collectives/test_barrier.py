"""The barrier: it waits for others, ends when the membership changes, and learns when to sleep."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest

from lockstep.collectives.barrier import SPINS, Barrier, Regroup
from lockstep.state.control_segment import ControlSegment, ControlShape
from lockstep.system.shared_memory import Segment
from lockstep.system.spin_budget import SpinBudget

WAIT = 20.0


@pytest.fixture
def control() -> Iterator[ControlSegment]:
    shape = ControlShape(shards=2, max_workers=2, params=1)
    with contextlib.closing(ControlSegment(Segment.create("c", shape.nbytes()), shape)) as control:
        yield control


class Waiter:
    """A thread that waits at a barrier."""

    def __init__(self, barrier: Barrier, progress: int) -> None:
        self.end: type[BaseException] | None = None
        self._thread = threading.Thread(target=self._wait, args=(barrier, progress), daemon=True)
        self._thread.start()

    def _wait(self, barrier: Barrier, progress: int) -> None:
        try:
            barrier.wait(progress)
        except Regroup:
            self.end = Regroup

    def ended(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()


@pytest.mark.parametrize("spins", [1, SPINS])
def test_it_waits_until_the_other_has_come_so_far(control: ControlSegment, spins: int) -> None:
    mine, other = (Barrier(control, worker_id, (0, 1), control.epoch) for worker_id in (0, 1))
    mine._budget = SpinBudget(spins)
    other.arrive(4)
    waiter = Waiter(mine, 5)
    assert not waiter.ended(0.05)
    other.arrive(5)
    assert waiter.ended(WAIT)
    assert waiter.end is None
    assert mine._budget.spins == 1  # the wait was a long one


@pytest.mark.parametrize("spins", [1, SPINS])
def test_it_ends_when_the_membership_changes(control: ControlSegment, spins: int) -> None:
    mine = Barrier(control, 0, (0, 1), control.epoch)
    mine._budget = SpinBudget(spins)
    waiter = Waiter(mine, 5)
    assert not waiter.ended(0.05)
    control.raise_epoch()
    assert waiter.ended(WAIT)
    assert waiter.end is Regroup


def test_who_is_alone_waits_for_nobody(control: ControlSegment) -> None:
    alone = Barrier(control, 0, (0,), control.epoch)
    alone.wait(5)
    control.raise_epoch()
    with pytest.raises(Regroup):
        alone.wait(6)
