"""The exchanger: a thread of the agent that gives other hosts what its workers have computed.

It sees the same shared memory as the workers and takes part in each step by a word of its own: it
waits until all of its host's workers have summed their gradients, sends these to every other host,
straight from the slots, receives theirs straight into the slots, and lets the workers go on.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from blake3 import blake3

from lockstep.collectives.exchange_plan import ExchangePlan, Gradient, Item
from lockstep.errors import NetworkError, PeerTimeoutError
from lockstep.net.frames import Kind
from lockstep.net.transport import Key, Pending, Transport
from lockstep.planning.step_phases import Phase, Stage, exchange_of, progress_of
from lockstep.state.control_segment import DIGEST_BYTES
from lockstep.system import futex
from lockstep.system.look_clock import LookClock

LOOK_SECONDS = 0.1
"""Between two looks at whether the exchange is called off."""
NAP = 0.02


PATIENCE_WITH_OWNERS = 1.5
"""An owner may itself wait for somebody's gradients, and is to complain first."""


class Early:
    """Whether gradients are sent while the backward pass goes on.

    That hides the time on the wire, but what encrypts and sends takes cores from the workers. So
    where there is no core to spare it is done only on links that are slow, as they are measured in
    one step of so many without it.
    """

    PROBE_STEPS = 64
    SLOW = 250e6
    """Bytes per second."""

    def __init__(self, nbytes: int, *, spare: bool) -> None:
        """`nbytes` come in each step; `spare`: there are more cores than threads that compute."""
        self._spare, self._slow, self._limit = spare, False, nbytes / self.SLOW

    def at(self, step: int) -> bool:
        return self._spare or (self._slow and step % self.PROBE_STEPS != 0)

    def took(self, seconds: float) -> None:
        """In a step without it, what came was waited for so long."""
        self._slow = seconds > self._limit


class CalledOff(Exception):
    """The hosts are being regrouped."""


class ExchangeThread:
    """One host's exchanges under one arrangement. `failed` is told, once, why it has ended."""

    def __init__(
        self,
        exchange_plan: ExchangePlan,
        transport: Transport,
        worker_ids: Callable[[], Sequence[int]],
        failed: Callable[[NetworkError], None],
        *,
        clip: bool,
        spare: bool,
        limit: Callable[[], float],
        flush: Callable[[], None] | None = None,
    ) -> None:
        """`worker_ids` are the host's workers at any time; `clip`: the norm of the gradients is
        limited; `spare`: the host has cores besides its workers'; `limit`: how many seconds one may
        wait for another host; `flush`: called before others of this host's items are sent, which
        must not overtake what its workers have shown on a board."""
        self.exchange_plan, self.transport, self.control = (
            exchange_plan,
            transport,
            exchange_plan.control,
        )
        self._worker_ids, self._failed, self._clip = worker_ids, failed, clip
        self._limit, self._flush = limit, flush
        self.awaited = frozenset[str]()
        """The other hosts that are waited for now."""
        self.mine = exchange_plan.mine.name
        self._early = Early(sum(self._sizes()), spare=spare)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _sizes(self) -> Iterator[int]:
        for other in self.exchange_plan.others:
            for _, view in self.exchange_plan.known(0, other, self.mine):
                yield view.nbytes

    def start(self, step: int) -> None:
        """Exchange from this step on. Called when all workers rest."""
        self._thread = threading.Thread(
            target=self._run, args=(step,), name="lockstep exchanger", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Call it off and wait for the thread's end.

        What is under way uses memory until its peer is dropped.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self, first: int) -> None:
        try:
            for step in itertools.count(first):
                self._exchange(step)
        except CalledOff:
            pass
        except NetworkError as error:
            self._failed(error)
        except Exception as error:  # such as no memory: the hosts are regrouped, and it is said why
            what = f"the exchange has failed on host {self.exchange_plan.mine.name}: {error!r}"
            self._failed(NetworkError(what))

    def _exchange(self, step: int) -> None:
        control, duties = self.control, self.exchange_plan.duties
        read = progress_of(step - 1, Phase.UPDATED)
        self._await(
            lambda worker_id: control.progress(worker_id) >= read
        )  # what came in the last step
        self._gather(step)
        if duties.owned_apart and self._clip:
            self._await_asked(exchange_of(step, Stage.NORMED))
            self._swap(step, self.exchange_plan.norms)
            control.set_exchanged(step, Stage.NORMED)
        if duties.returns != "nothing":
            self._await_asked(exchange_of(step + 1, Stage.STARTED), (step, Stage.RETURNING))
            if duties.owned_apart:
                self._digest(step)
            self._swap(step, partial(self.exchange_plan.returned, step))
        control.set_exchanged(step + 1, Stage.STARTED)

    def _gather(self, step: int) -> None:
        """Give every owner its part of this host's gradients, and get this one's from everybody."""
        exchange_plan = self.exchange_plan
        coming = [
            slip
            for other in exchange_plan.others
            for slip in self._expect(step, exchange_plan.known(step, other, self.mine), other.name)
        ]
        early = self._early.at(step)
        going = self._send_gradients(step, early=early)
        for other in exchange_plan.others:
            going += self._send(step, exchange_plan.beside(step, exchange_plan.mine), other.name)
            going += self._send(
                step, exchange_plan.told(step, exchange_plan.mine, other.name), other.name
            )
        begun = time.monotonic()
        self._await_all(coming)
        if not early:
            self._early.took(time.monotonic() - begun)
        for other in exchange_plan.others:
            exchange_plan.check(other)
            exchange_plan.check_counts(step, other)
        more = [
            slip
            for other in exchange_plan.others
            for slip in self._expect(step, exchange_plan.told(step, other, self.mine), other.name)
        ]
        self._await_all([*more, *going])
        for other in exchange_plan.others:
            exchange_plan.check_rows(other)
            exchange_plan.check_names(step, other)
        self.control.set_exchanged(step, Stage.GATHERED)

    def _swap(self, step: int, items: Callable[[str], Iterable[Item]]) -> None:
        """Give everybody this host's items, and get everybody's own."""
        others = [other.name for other in self.exchange_plan.others]
        if self._flush is not None:
            self._flush()
        coming = [slip for other in others for slip in self._expect(step, items(other), other)]
        going = [slip for other in others for slip in self._send(step, items(self.mine), other)]
        self._await_all([*coming, *going], PATIENCE_WITH_OWNERS)

    def _digest(self, step: int) -> None:
        """Digest what of the step's sample of the state only this host has."""
        for index, view in self.exchange_plan.audited(step, self.mine):
            self.control.set_digest(step, index, blake3(view).digest(DIGEST_BYTES))

    # Going and coming.

    def _send_gradients(self, step: int, *, early: bool) -> list[Pending]:
        """Send gradients, `early` as they come, until all workers have made this step's sums, and
        then the rest. Of a subtree of several shards the sum goes, which comes last."""
        waiting = [
            (gradient, other.name)
            for other in self.exchange_plan.others
            for gradient in self.exchange_plan.gradients(self.exchange_plan.mine, other.name)
        ]
        going: list[Pending] = []

        def look() -> None:
            late = []
            for gradient, other in waiting:
                if self._ready(step, gradient):
                    going.extend(self._send(step, gradient.items, other))
                else:
                    late.append((gradient, other))
            waiting[:] = late

        wanted = exchange_of(step, Stage.GATHERED)
        self._await_asked(wanted, (step, Stage.SENDING), look if early else None)
        for gradient, other in waiting:
            going += self._send(step, gradient.items, other)
        return going

    def _ready(self, step: int, gradient: Gradient) -> bool:
        tree = gradient.tree
        ready = self.control.ready[tree.start, gradient.params]
        return len(tree) == 1 and bool(gradient.params) and bool((ready == step + 1).all())

    def _send(self, step: int, items: Iterable[Item], peer: str) -> list[Pending]:
        return [
            self.transport.send(peer, Key(Kind.PARTIAL, step, tag), view) for tag, view in items
        ]

    def _expect(self, step: int, items: Iterable[Item], peer: str) -> list[Pending]:
        return [
            self.transport.expect(peer, Key(Kind.PARTIAL, step, tag), view) for tag, view in items
        ]

    # Waits: each ends when the hosts are regrouped.

    def _await_asked(
        self,
        word: int,
        then: tuple[int, Stage] | None = None,
        look: Callable[[], None] | None = None,
    ) -> None:
        """Wait until every worker waits for the exchange to come so far, and has done its part;
        `then` is published before another membership could begin to do it once more."""
        self._await(lambda worker_id: self.control.awaited_exchange(worker_id) >= word, then, look)

    def _await(
        self,
        there: Callable[[int], bool],
        then: tuple[int, Stage] | None = None,
        look: Callable[[], None] | None = None,
    ) -> None:
        """Wait until this holds of every worker of the host, whoever they are. `look` is called
        whenever there may be something new."""
        control = self.control
        while True:
            bell = control.notifications
            if self._stop.is_set():
                raise CalledOff
            if look is not None:
                look()
            with control.membership_lock:
                worker_ids = self._worker_ids()
                if worker_ids and all(map(there, worker_ids)):
                    if then is not None:
                        control.set_exchanged(*then)
                    return
            futex.wait(control.notification_address, bell, NAP)

    def _await_all(self, slips: Sequence[Pending], patience: float = 1.0) -> None:
        """Wait for what peers send and take; `patience` times as long as ever, where they may wait
        for others themselves.

        Raises:
            PeerTimeoutError: one has done nothing for too long, though its heart may beat.
        """
        try:
            for place, slip in enumerate(slips):
                waited, clock = 0.0, LookClock()
                while not slip.done():
                    if self._stop.is_set():
                        raise CalledOff
                    try:
                        slip.wait(LOOK_SECONDS)
                    except PeerTimeoutError:
                        if slip.ended:  # not this wait's time is up, but the connection's
                            raise
                        late = slips[place:]
                        self.awaited = frozenset(each.peer for each in late if not each.ended)
                    waited += clock.passed()
                    if waited > (limit := patience * self._limit()) and not slip.done():
                        raise PeerTimeoutError(
                            f"host {slip.peer} exchanges nothing",
                            expected=f"{slip.what} within {limit:.1f} s",
                            found=f"none for {waited:.1f} s",
                        )
        finally:
            self.awaited = frozenset()
