"""Loader: a worker's batches, fetched by itself or by loader processes."""

from __future__ import annotations

import functools
import itertools
import math
import os
import pickle
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

from lockstep.data.fetching import Fetch, TensorRows
from lockstep.data.loader_ipc import MemfdContext, TensorChannel
from lockstep.data.order_rules import Indices, OrderRule
from lockstep.data.sample_order import SampleOrder
from lockstep.errors import TaskError
from lockstep.planning.sampling import Sampling
from lockstep.system.process_title import set_title
from lockstep.system.processes import (
    close_device_files,
    die_with_parent,
    own_file_positions,
)


@dataclass
class FetchTimes:
    """What fetching the first batches cost: `(wall, cpu)` seconds of each."""

    each: list[tuple[float, float]] = field(default_factory=list)

    def typical(self) -> tuple[float, float]:
        """Wall and cpu seconds of a batch. The slowest quarter is left out: a first fetch, and one
        that was interrupted by other processes, say little about the others."""
        kept = sorted(self.each)[: math.ceil(len(self.each) * 3 / 4)]
        return sum(wall for wall, _ in kept) / len(kept), sum(cpu for _, cpu in kept) / len(kept)


TRIAL_FETCHES = 8
DYING_SECONDS = 10.0
"""How long a loader process that has broken a connection may take to die: it has died already, but
on a busy machine the kernel may take its time to say so."""


def wants_loaders(times: FetchTimes, compute_seconds: float, spare_cores: int) -> tuple[bool, str]:
    """Whether fetching should move to another process, and why.

    `compute_seconds` is what the same number of shards took to compute.
    """
    each, cpu = times.typical()
    if each < 0.001 or each * len(times.each) < 0.05 * compute_seconds:
        return False, f"fetching takes {each * 1e3:.2f} ms a batch: not worth a process"
    blocked = 1 - cpu / each
    if blocked < 0.3 and spare_cores < 1:
        return False, "fetching is all computation and no core is idle"
    return True, f"fetching takes {each * 1e3:.1f} ms a batch, {blocked:.0%} of it waiting"


Work = tuple[int, int]
"""`(step, shard)`."""


class Loader:
    """A worker's batches, in the order in which it will compute its shards.

    It begins in the worker itself, a shard or a few small ones ahead: `prefetch` is called when the
    worker has nothing better to do. Where fetching proves slow it moves to loader processes
    (PyTorch's `DataLoader`), which changes no bit, since samples are seeded by their indices.
    """

    def __init__(
        self,
        fetch: Fetch,
        sampling: Sampling,
        *,
        loaders: int | None,
        spare_cores: int,
        last: int,
        part: int = 0,
        rule: OrderRule | None = None,
    ) -> None:
        """`part`: which one of the data's parts `fetch` fetches from; `rule`: what decides its
        order."""
        self.fetch, self.sampling, self.loaders = fetch, sampling, loaders
        self.spare_cores, self.last = spare_cores, last
        self.decision = "" if loaders is None else f"loaders={loaders} by request"
        self._order = SampleOrder(sampling, part, rule)
        self._new_order = functools.partial(SampleOrder, sampling, part, rule)
        self._shards: Sequence[int] = ()
        self._upcoming: Iterator[Work] = iter(())
        self._planned: deque[Work] = deque()
        """What has been taken from `_upcoming`, the next work first."""
        self._ahead: deque[Any] = deque()
        """The batches of the first of them."""
        self._failed: Exception | None = None
        """What was raised when they were to be fetched; it is raised when the first is due."""
        self._stream: Iterator[Any] | None = None
        self._processes: list[BaseProcess] = []
        """The loader processes, also while the stream is being made."""
        self._handover = TensorChannel(0)
        self._times = FetchTimes()

    def assign(self, shards: Sequence[int], step: int) -> None:
        """Say which shards will be asked for, in this order, from `step` on."""
        self.close()
        self._shards = shards
        self._upcoming = self._work(step)
        self._planned.clear()
        self._plan(1)
        if self.loaders:
            self._start()

    def get(self, step: int, shard: int) -> Any:
        """The batch of a shard; work that was not assigned is fetched on the spot."""
        work = (step, shard)
        if not self._planned or work != self._planned[0]:
            return self._fetch([work])[0]
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed
        if self._stream is not None and (loaded := self._from_stream()) is not None:
            batch = loaded.batch
        elif self._ahead:
            batch = self._ahead.popleft()
        else:
            batch = self._fetch([work])[0]
        self._advance()
        return batch

    def skip(self, step: int, shard: int) -> None:
        """Leave out a shard that somebody else has computed."""
        if self._planned and self._planned[0] == (step, shard):
            if self._stream is not None:
                next(self._stream)
            elif self._ahead:
                self._ahead.popleft()
            self._failed = None
            self._advance()

    def prefetch(self) -> None:
        """Fetch what comes next now, in the worker, unless loader processes do it."""
        if self._stream is None and not self._ahead and self._failed is None and self._planned:
            if isinstance(self.fetch, TensorRows):
                start, stop = self.sampling.shard_span(*self._planned[0])
                self._plan(self.fetch.ahead(stop - start))
            try:
                self._ahead.extend(self._fetch(self._planned))
            except Exception as error:  # the step in which it is met is the one that needs it
                self._failed = error

    def samples(self, step: int, shard: int) -> list[int]:
        """The samples of a shard of a step: indices into the training set."""
        indices: list[int] = self._order.indices(step, shard).tolist()
        return indices

    def repeats(self, step: int, shard: int) -> Indices | None:
        """How often each of them came before in the data epoch, as `SampleOrder.repeats`."""
        return self._order.repeats(step, shard)

    def consider(self, compute_seconds: float) -> None:
        """Choose between worker and loader processes, once enough has been measured."""
        if self.decision or len(self._times.each) < TRIAL_FETCHES:
            return
        move, self.decision = wants_loaders(self._times, compute_seconds, self.spare_cores)
        self.loaders = int(move)
        if move and self._planned:
            self._start()

    def has_lost_a_process(self, error: BaseException) -> bool:
        """Whether a loader process has died, or dies right now, where the worker has met this
        error. PyTorch tells it by one from a signal's handler, wherever the worker is; a broken
        connection may come before that."""
        started = [process for process in self._processes if process.pid is not None]
        if not started:
            return False
        broken = isinstance(error, ConnectionError | EOFError)
        try:
            sentinels = [process.sentinel for process in started]
            return bool(wait(sentinels, DYING_SECONDS if broken else 0.0))
        except RuntimeError:
            return True

    def do_without(self) -> None:
        """Fetch in the worker from now on: loader processes have died again and again."""
        self.loaders, self.decision = 0, "loader processes died"

    def close(self) -> None:
        """End the loader processes and drop what was fetched ahead."""
        self._stream = self._failed = None
        self._processes = []
        self._handover.close()
        self._ahead.clear()

    def _from_stream(self) -> _Loaded | None:
        """The next batch from the loader processes; None if they cannot hand batches over.

        Raises:
            TaskError: they cannot, but were asked for.
        """
        assert self._stream is not None
        loaded: _Loaded = next(self._stream)
        if not loaded.problem:
            return loaded
        if self.decision.endswith("by request"):
            raise TaskError(
                "a batch cannot be handed over by a loader process",
                expected="batches that can be pickled",
                found=loaded.problem,
                fix="set loaders to 0, or have Task.collate return plain tensors and containers",
            )
        self.close()
        self.loaders = 0
        self.decision = f"batches cannot be pickled: {loaded.problem}"
        return None

    def _work(self, first: int) -> Iterator[Work]:
        for step in range(first, self.last):
            for shard in self._shards:
                if shard in self.sampling.active(step):
                    yield step, shard

    def _advance(self) -> None:
        self._planned.popleft()
        if not self._planned:
            self._plan(1)

    def _plan(self, works: int) -> None:
        self._planned.extend(itertools.islice(self._upcoming, works - len(self._planned)))

    def _fetch(self, works: Sequence[Work]) -> list[Any]:
        """The batches of these works."""
        indices = [self._order.indices(*work) for work in works]
        if isinstance(self.fetch, TensorRows) and len(works) > 1:
            return list(self.fetch.several(indices))
        wall, cpu = time.perf_counter(), time.thread_time()
        batches = [
            self.fetch(self.sampling.data_epoch(step), rows, self._order.repeats(step, shard))
            for (step, shard), rows in zip(works, indices, strict=True)
        ]
        if not self.decision:
            self._times.each.append((time.perf_counter() - wall, time.thread_time() - cpu))
        return batches

    def _start(self) -> None:
        """Move to loader processes, from the next assigned batch on."""
        self._ahead.clear()
        self._failed = None
        self._handover = TensorChannel(self.loaders or 1)
        context = MemfdContext()
        self._processes = context.processes
        self._stream = iter(
            DataLoader(
                _Requests(self.fetch),
                sampler=_Requested(self._requests()),
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=self.loaders or 1,
                multiprocessing_context=context,
                worker_init_fn=functools.partial(begin_loading, os.getpid(), self._handover),
            )
        )
        self._handover.forked()

    def _requests(self) -> Iterator[_Request]:
        """What the loader processes are asked for: they run ahead of `_planned`."""
        if not self._planned:
            return
        order, first = self._new_order(), self._planned[0]
        for work in itertools.dropwhile(lambda item: item != first, self._work(first[0])):
            epoch, repeats = self.sampling.data_epoch(work[0]), order.repeats(*work)
            yield epoch, order.indices(*work).tolist(), repeats


_Request = tuple[int, list[int], Indices | None]
"""`(data_epoch, indices, repeats)`, as `Fetch` takes them."""


@dataclass(frozen=True)
class _Loaded:
    """A batch from a loader process, or why it cannot be handed over."""

    batch: Any
    problem: str = ""


class _Requests(Dataset[Any]):
    """A data set whose items are whole batches, indexed by requests.

    The first batch is pickled for a trial: where that fails, torch's queue would lose the batch
    and wait for it for ever.
    """

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch
        self._tried = False

    def __getitem__(self, request: _Request) -> _Loaded:
        batch = self.fetch(*request)
        if not self._tried:
            try:
                pickle.dumps(batch)
            except Exception as error:
                return _Loaded(None, str(error))
            self._tried = True
        return _Loaded(batch)


class _Requested:
    """A sampler over a given sequence of requests."""

    def __init__(self, requests: Iterator[_Request]) -> None:
        self.requests = requests

    def __iter__(self) -> Iterator[_Request]:
        return self.requests


def _as_it_is(batch: Any) -> Any:
    return batch


def follow_worker(worker: int) -> None:
    """In a loader process: end when the worker does, or now if it has already.

    Torch's own watchdog takes whatever the parent is by now for the worker, and so would stay for
    ever where the worker was killed just after the fork.
    """
    die_with_parent(worker)
    close_device_files()
    own_file_positions()


def begin_loading(worker: int, handover: TensorChannel, loader: int) -> None:
    """Called first in a loader process: it is the worker's, by this number."""
    follow_worker(worker)
    set_title(f"loader {loader} of pid {worker},")
    handover.begin(loader)
