"""The native tail of a step: the bytes of the sums and updates that Python makes, the same words in
shared memory, and every wait ends."""

from __future__ import annotations

import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from lockstep.collectives.tree_sum import Reducer
from lockstep.native.step_tail import (
    COMMITTED,
    NOT_UNIFORM,
    REGROUP,
    additions,
    lowered_part,
    option_values,
)
from lockstep.planning.reduction_tree import tree
from tests.optim.test_direct_update import CASES, Twins
from tests.support.native_path import native_module

__all__ = ["native_module"]  # a fixture

EPOCH = 3
COMPUTED, UPDATED = 57, 63
"""Progress words of step 7."""


class Words:
    """The words of two workers, in memory that forks share."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, 4096)
        self.words = np.frombuffer(self.map, np.int32)
        self.flags = np.frombuffer(self.map, np.uint8, 4, 1024)
        self.rates = np.frombuffer(self.map, np.float64, 16, 2048)
        self.flags[:] = 1
        self.epoch[0] = EPOCH
        self.updating[0] = -1

    def _word(self, number: int) -> Any:
        return self.words[16 * number : 16 * number + 1]

    @property
    def mine(self) -> Any:
        return self._word(0)

    @property
    def other(self) -> Any:
        return self._word(1)

    @property
    def epoch(self) -> Any:
        return self._word(2)

    @property
    def updating(self) -> Any:
        return self._word(3)

    def tail(self, module: Any, *, alone: bool = False, spins: int = 1) -> Any:
        return module.StepTail(
            self.mine.ctypes.data,
            [] if alone else [self.other.ctypes.data],
            self.epoch.ctypes.data,
            self.updating.ctypes.data,
            (self.flags.ctypes.data, self.flags.size),
            self.rates.ctypes.data,
            EPOCH,
            spins,
        )


@pytest.fixture
def words() -> Iterator[Words]:
    made = Words()
    yield made
    for name in ("words", "flags", "rates"):
        delattr(made, name)
    made.map.close()


def finish(tail: Any, options: list[list[float]] | None = None) -> tuple[int, list[float]]:
    ending, *times = tail.finish(7, COMPUTED, UPDATED, 7, 0.25, options or [])
    return ending, times


@pytest.mark.parametrize("shards", range(2, 10))
@pytest.mark.parametrize("size", [1, 37, 100])
def test_the_sums_of_the_reducer(shards: int, size: int, native_module: Any, words: Words) -> None:
    """In pieces, too."""
    leaves = [torch.randn(size) for _ in range(shards)]
    wanted, found = torch.empty(size), torch.empty(size)
    node = tree((True,) * shards)
    assert node is not None

    class Shared:
        slots = leaves

    Reducer(Shared()).sum((True,) * shards, leaves, wanted)  # type: ignore[arg-type]
    tail = words.tail(native_module, alone=True)
    tail.group(additions(node, leaves, found, piece=16), [])
    assert finish(tail)[0] == COMMITTED
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_of_step(name: str, native_module: Any, words: Words) -> None:
    twins = Twins(CASES[name])
    direct = twins.direct()
    assert direct is not None
    options = [option_values(part.options) for part in direct.parts]
    if name in ("adam tensor", "sgd dampened"):  # rates that are tensors are left to Python
        assert None in options
        return
    for number in range(5):
        for optimizer in (twins.optimizer, twins.other):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (1 + number)
        gradients = twins.gradients()
        tail = words.tail(native_module, alone=True)
        tail.group(
            [],
            [
                lowered_part(
                    part.kernel, part.params, [gradients[i] for i in part.indices], part.state
                )
                for part in direct.parts
            ],
        )
        values = [option_values(part.options) for part in direct.parts]
        assert finish(tail, values)[0] == COMMITTED  # type: ignore[arg-type]
        for param, gradient in zip(twins.others, gradients, strict=True):
            param.grad = gradient
        twins.other.step()
        twins.assert_equal()


def test_what_others_see_of_a_committed_step(native_module: Any, words: Words) -> None:
    words.other[0] = UPDATED
    begun = time.perf_counter()
    ending, times = finish(words.tail(native_module))
    assert ending == COMMITTED
    assert [begun, *times] == sorted([begun, *times])
    assert times[-1] <= time.perf_counter()
    assert (words.mine[0], words.updating[0], words.rates[7]) == (UPDATED, 7, 0.25)


def test_a_gradient_is_missing(native_module: Any, words: Words) -> None:
    """Nothing has been done then."""
    words.other[0], words.flags[2] = COMPUTED, 0
    assert finish(words.tail(native_module))[0] == NOT_UNIFORM
    assert (words.mine[0], words.updating[0], words.rates[7]) == (0, -1, 0.0)


@pytest.mark.parametrize("spins", [1, 1 << 29], ids=["asleep", "awake"])
@pytest.mark.parametrize("reached", [0, COMPUTED])
def test_a_new_epoch_ends_both_waits(
    spins: int, reached: int, native_module: Any, words: Words
) -> None:
    words.other[0] = reached

    def raise_epoch() -> None:
        while reached and words.mine[0] < UPDATED:
            time.sleep(0.001)
        words.epoch[0] = EPOCH + 1

    helper = threading.Thread(target=raise_epoch)
    helper.start()
    assert finish(words.tail(native_module, spins=spins))[0] == REGROUP
    helper.join()
    assert words.updating[0] == (7 if reached else -1)


def test_a_lone_worker_looks_at_the_epoch(native_module: Any, words: Words) -> None:
    words.epoch[0] = EPOCH + 1
    assert finish(words.tail(native_module, alone=True))[0] == REGROUP


def test_arriving_wakes_who_waits(native_module: Any, words: Words) -> None:
    """Naps end by themselves after 20 ms: ten meetings take less than ten of these."""
    pid = os.fork()
    if pid == 0:
        mirrored = native_module.StepTail(  # the same words, seen from the other side
            words.other.ctypes.data, [words.mine.ctypes.data], words.epoch.ctypes.data,
            words.words[64:65].ctypes.data, (words.flags.ctypes.data, 4), 0, EPOCH, 1,
        )  # fmt: skip
        ended = [_meet(mirrored, number) for number in range(40)]
        os._exit(0 if ended == [COMMITTED] * 40 else 1)
    tail = words.tail(native_module)
    begun = time.monotonic()
    assert [_meet(tail, number) for number in range(40)] == [COMMITTED] * 40
    taken = time.monotonic() - begun
    assert os.waitpid(pid, 0)[1] == 0
    assert taken < 40 * 2 * 0.02 / 2


def _meet(tail: Any, number: int) -> int:
    first = 100 + 8 * number
    tail.arrive(first + 1)
    ending: int = tail.finish(number, first + 1, first + 7, 0, 0.0, [])[0]
    return ending


def test_signals_are_heard_while_it_waits(native_module: Any, words: Words) -> None:
    """As everywhere in Python: a handler may raise, too."""

    def strike(*_: object) -> None:
        raise KeyError("struck")

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyError, match="struck"):
            finish(words.tail(native_module))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_killed_in_the_middle_of_an_update(native_module: Any, words: Words) -> None:
    """The words say that the update has begun, and has not ended."""
    words.other[0] = UPDATED
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        size = 1 << 22
        tensors = {name: [torch.ones(size)] for name in ("p", "g", "exp_avg", "exp_avg_sq")}
        state = {name: tensors[name] for name in ("exp_avg", "exp_avg_sq")}
        part = lowered_part(
            "adam", tensors["p"], tensors["g"], {**state, "step": [torch.tensor(1.0)]}
        )
        tail = words.tail(native_module)
        tail.group([], [part] * 200)
        finish(tail, [[0.1, 0.9, 0.99, 0.0, 1e-8, 0.0, 0.0]] * 200)
        os._exit(1)
    limit = time.monotonic() + 30
    while words.updating[0] != 7 and time.monotonic() < limit:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert words.updating[0] == 7
    assert words.mine[0] < UPDATED


@pytest.mark.parametrize("option", ["lr", "weight_decay", "eps"])
def test_options_that_are_no_numbers_are_left_to_python(option: str) -> None:
    options = Twins(CASES["adam"]).optimizer.param_groups[0]
    assert option_values(options) is not None
    assert option_values({**options, option: torch.tensor(0.1)}) is None
