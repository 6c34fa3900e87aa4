"""Boards: what members show each other, and that no word is taken for another."""

from __future__ import annotations

import functools
import os
import random
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from lockstep.errors import IntegrityError, ResourceError
from lockstep.slices.board import Board, PassRestarted
from lockstep.slices.board_memory import NOTHING_LEFT, BoardMemory
from lockstep.slices.shown_tensors import TensorBuffer, read_tensors, write_tensors
from lockstep.system import futex

KIND, OTHER = 1, 2
WAIT = 5.0
"""Seconds, after which a test has failed."""


class NothingComes(Exception):
    """It was looked often enough."""


@pytest.fixture
def memory() -> Iterator[BoardMemory]:
    made = BoardMemory.create(3)
    yield made
    made.close()


def board(
    memory: BoardMemory,
    worker_id: int,
    members: tuple[int, ...] = (0, 1),
    epoch: int = 1,
    looks: int | None = None,
) -> Board:
    """A member's end. `looks`: how often it looks before it gives up."""
    left, last = [looks], time.monotonic() + WAIT

    def look() -> None:
        if left[0] is not None:
            left[0] -= 1
        if left[0] == -1 or time.monotonic() > last:
            raise NothingComes

    return Board(memory, members, worker_id, epoch, spins=1, look=look, awaits=lambda _: None)


def together(*works: Callable[[], Any]) -> list[Any]:
    """Run side by side; what each returns."""
    with ThreadPoolExecutor(len(works)) as pool:
        futures = [pool.submit(work) for work in works]
    errors = [error for future in futures if (error := future.exception())]
    first = [error for error in errors if not isinstance(error, NothingComes)] or errors
    if first:  # the others waited for this one in vain
        raise first[0]
    return [future.result() for future in futures]


def test_tensors_come_as_they_are() -> None:
    """Of any type, size and order of elements; those that are not there, too."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, 4096)
    writer, reader = TensorBuffer(fd), TensorBuffer(fd)
    for tensors in (
        [torch.randn(3, 4), None, torch.arange(5)],
        [torch.randn(2, 0), torch.tensor(1.5), torch.tensor([True, False])],
        [torch.randn(4, 6).T, torch.randn(6, 8)[:, 2:5], torch.randn(7, 3, dtype=torch.bfloat16)],
        [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), torch.ones(1).expand(9)],
        [torch.randn(300, 300, dtype=torch.complex64)],
        [],
    ):
        write_tensors(writer, KIND, tensors)
        found = read_tensors(reader)
        assert found.kind == KIND
        assert len(found.tensors) == len(tensors)
        for mine, theirs in zip(tensors, found.tensors, strict=True):
            if mine is None or theirs is None:
                assert mine is theirs
                continue
            assert torch.equal(mine, theirs)
            assert mine.dtype == theirs.dtype
            assert (mine + mine).stride() == (theirs + theirs).stride()
    os.close(fd)


def steps(memory: BoardMemory, worker_id: int, turns: int, members: tuple[int, ...]) -> list[float]:
    """Some turns of some exchanges; what is seen of the others."""
    own, seen = board(memory, worker_id, members), []
    for turn in range(turns):
        if own.leads:
            own.announce(turn)
        else:
            assert own.follow() == turn
        for number in range(turn % 4 + 1):
            own.show(KIND, [torch.full((1 + 700 * turn,), turn * 10.0 + worker_id + number)])
            for other in own.others:
                (value,) = own.shown(other, KIND)
                assert value is not None
                seen.append(float(value.max() - other))
        own.finish(float(turn), 0)
    if own.leads:
        own.announce(NOTHING_LEFT)
    else:
        assert own.follow() == NOTHING_LEFT
    return seen


def test_members_see_what_the_others_show(memory: BoardMemory) -> None:
    members = (2, 0, 1)
    found = together(*(functools.partial(steps, memory, each, 30, members) for each in members))
    wanted = [
        turn * 10.0 + number for turn in range(30) for number in range(turn % 4 + 1) for _ in (1, 2)
    ]
    assert found == [wanted] * 3


def test_lost_wake_ups_cost_a_moment(memory: BoardMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is ever woken: words are looked at again."""
    monkeypatch.setattr(futex, "wake", lambda _: None)
    draw = random.Random(1)

    def wait(address: int, value: int, seconds: float, wait: Any = futex.wait) -> None:
        wait(address, value, seconds if draw.random() < 0.1 else 0.0)  # or for no reason

    monkeypatch.setattr(futex, "wait", wait)
    one, other = together(*(functools.partial(steps, memory, each, 8, (0, 1)) for each in (0, 1)))
    assert one == other


@pytest.mark.parametrize("died_at", ["an exchange", "an attempt", "the end"])
def test_words_of_an_earlier_epoch_do_not_count(memory: BoardMemory, died_at: str) -> None:
    """However far ahead they are: the member that has left them is not there."""
    old = [board(memory, each, epoch=1) for each in (0, 1)]
    for _ in range(5):
        together(lambda: old[0].announce(3), old[1].follow)
        together(*(functools.partial(each.show, KIND, []) for each in old))
    if died_at == "an attempt":
        together(*(each.again for each in old))
    if died_at == "the end":
        together(*(functools.partial(each.finish, 1.0, 0) for each in old))
        old[0].announce(NOTHING_LEFT)
    new = board(memory, 1, epoch=2, looks=5)
    with pytest.raises(NothingComes):
        new.follow()
    leader = board(memory, 0, epoch=3, looks=5)
    leader.announce(4)
    with pytest.raises(NothingComes):
        leader.show(KIND, [])  # worker 1 is at epoch 2 still
    again = [board(memory, each, epoch=4) for each in (1, 0)]
    assert together(again[0].follow, lambda: again[1].announce(7)) == [7, None]
    together(*(functools.partial(each.show, OTHER, []) for each in again))
    assert again[0].shown(0, OTHER) == []


def test_a_member_that_begins_again_takes_the_others_with_it(memory: BoardMemory) -> None:
    """Wherever they are: at an exchange that it has not come to, or at the end of the shard."""
    for end in (False, True):
        one, other = (board(memory, each, epoch=1 + end) for each in (0, 1))
        together(functools.partial(one.announce, 2), other.follow)
        together(*(functools.partial(each.show, KIND, [torch.ones(3)]) for each in (one, other)))

        def waits(other: Board = other, end: bool = end) -> str:
            with pytest.raises(PassRestarted):
                other.finish(0.0, 0) if end else other.show(KIND, [])
            other.again()
            other.show(KIND, [torch.zeros(2)])
            return "again"

        def restarts(one: Board = one) -> list[Any]:
            one.again()
            one.show(KIND, [])
            return one.shown(1, KIND)

        found, shown = together(waits, restarts)
        assert found == "again"
        assert torch.equal(shown[0], torch.zeros(2))


def test_members_at_odds_are_named(memory: BoardMemory) -> None:
    one, other = (board(memory, each) for each in (0, 1))
    together(functools.partial(one.show, KIND, []), functools.partial(other.show, OTHER, []))
    with pytest.raises(IntegrityError, match=r"workers 0 and 1 of one team .* other exchanges"):
        one.shown(1, KIND)


@pytest.mark.parametrize(
    ("theirs", "what"), [((1.0 + 2**-52, 7), "another loss"), ((1.0, 8), "other results")]
)
def test_another_loss_is_an_error(
    memory: BoardMemory, theirs: tuple[float, int], what: str
) -> None:
    one, other = (board(memory, each) for each in (0, 1))

    def finish(each: Board, loss: float, logged: int) -> str:
        with pytest.raises(IntegrityError, match=what) as caught:
            each.finish(loss, logged)
        return caught.value.found

    found = together(
        functools.partial(finish, one, 1.0, 7), functools.partial(finish, other, *theirs)
    )
    assert "of worker 0" in found[0]
    assert "of worker 1" in found[1]


def test_nothing_is_shown_in_a_pass_that_was_cut_short(memory: BoardMemory) -> None:
    """Though user code has caught what ended it, and goes on."""
    one, other = board(memory, 0, looks=3), board(memory, 1)
    together(functools.partial(one.announce, 0), other.follow)
    with pytest.raises(NothingComes):
        one.show(KIND, [])
    other.show(KIND, [])
    for attempt in (lambda: one.show(KIND, []), lambda: one.finish(0.0, 0)):
        with pytest.raises(NothingComes):
            attempt()
    assert one.count == 1


def test_too_few_descriptors_are_said() -> None:
    """And none is left open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 20, hard))
    try:
        with pytest.raises(ResourceError, match="boards of teams") as caught:
            BoardMemory.create(64)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "128 file descriptors" in caught.value.expected
    assert len(os.listdir("/proc/self/fd")) == before
