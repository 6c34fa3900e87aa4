"""Failures: who died where, who has stalled, what it cost; and when to stop for good."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from lockstep.channel import Message
from lockstep.checkpoint import non_finite_tensors
from lockstep.control import Phase, describe_progress, progress_of
from lockstep.errors import LockstepError, NonFiniteError, PoisonError, from_message
from lockstep.history import History
from lockstep.host import Host, Seat
from lockstep.membership import Status
from lockstep.recovery import POISON_DEATHS, Resumption, stalled
from lockstep.sink import Sink


class Failures:
    """Watches the workers of one host and keeps the record of each recovery."""

    def __init__(self, host: Host, history: History, sink: Sink) -> None:
        self.host, self.history, self.sink = host, history, sink
        self.control = host.control
        self._signs: dict[int, tuple[tuple[int, int, int], float]] = {}
        self._deaths: Counter[tuple[int, int]] = Counter()
        self._stalled_for: dict[int, float] = {}
        self._open: list[dict[str, Any]] = []
        self.looked = time.monotonic()
        """When the workers were last looked at: a death since then is noticed at the next look."""

    # Deaths.

    def died(self, seat: Seat, status: Status | None) -> None:
        """Take note of a death: undo what the worker had half done, and count it.

        Raises:
            PoisonError: the same shard of the same step has taken too many workers with it.
        """
        now = time.monotonic()
        how = self.host.how_it_ended(seat)
        word, shard = self.control.progress(seat.number), self.control.shard(seat.number)
        step, phase = describe_progress(word)
        undone = self.host.undo.restore(seat.number, self.host.state, self.control.block_done)
        waited = self._stalled_for.pop(seat.number, None)
        self._signs.clear()  # whoever waited for it starts afresh
        facts = {
            "worker": seat.number,
            "pid": seat.pid,
            "step": step,
            "phase": phase,
            "shard": shard if word == progress_of(step, Phase.STARTED) else None,
            "how": how,
            "undone": undone,
        }
        self.sink.event("died", status=status.value if status else None, **facts)
        if status in (Status.WORKING, Status.RESTING):
            detection = waited if waited is not None else now - self.looked
            self._open.append({**facts, "detection_ms": round(detection * 1e3, 2), "at": now})
        if facts["shard"] is not None and status is Status.WORKING:
            self._deaths[step, shard] += 1
            if self._deaths[step, shard] >= POISON_DEATHS:
                raise self._poison(step, shard, how)

    def _poison(self, step: int, shard: int, how: str) -> PoisonError:
        from lockstep.data import Order  # torch, which only this needs

        sampling = self.history.sampling
        indices = Order(sampling).indices(step, shard).tolist()
        listed = ", ".join(map(str, indices[:16])) + (", …" if len(indices) > 16 else "")
        return PoisonError(
            f"shard {shard} of step {step} has killed {POISON_DEATHS} workers, one after another",
            found=f"the last one {how}; its samples are {listed}",
            fix="look at these samples (indices into the training set), then resume the run",
        )

    def regrouped(self, resumption: Resumption) -> None:
        """A new membership goes on from here."""
        now = time.monotonic()
        for record in self._open:
            record["regroup_ms"] = round((now - record["at"]) * 1e3, 2)
            record["recomputed"] = sum(map(len, resumption.todo))
        self._signs.clear()

    def recovered(self, committed: float) -> list[dict[str, Any]]:
        """A step was committed at this time: the recoveries that it completes, if any."""
        done = [r for r in self._open if "regroup_ms" in r and committed >= r["at"]]
        self._open = [r for r in self._open if r not in done]
        for record in done:
            since = round((committed - record.pop("at")) * 1e3, 2)
            record["recovery_ms"] = max(since, record["regroup_ms"])  # mended while regrouping
            self.sink.event("recovered", **record)
        return done

    # Stalls.

    def kill_stalled(self, working: set[int]) -> None:
        """Kill the workers among `working` that hold the others up and show no sign of life."""
        seats = [seat for seat in self.history.seats if seat in working]
        if not seats:
            return
        now = time.monotonic()
        still = []
        for seat in seats:
            sign = self.control.sign_of_life(seat)
            last, since = self._signs.get(seat, (None, now))
            if last != sign:
                self._signs[seat], since = (sign, now), now
            still.append(now - since)
        words = [self.control.progress(seat) for seat in seats]
        behind, reason = stalled(words, still, self.history.patience.limit)
        for index in behind:
            self._kill(self.host.seats[seats[index]], still[index], reason)

    def _kill(self, seat: Seat, still: float, reason: str) -> None:
        step, phase = describe_progress(self.control.progress(seat.number))
        self.sink.event(
            "stalled",
            worker=seat.number,
            pid=seat.pid,
            step=step,
            phase=phase,
            reason=reason,
            state=seat.process_state(),
            stack=seat.python_stack(),
        )
        self._stalled_for[seat.number] = still
        self._signs.pop(seat.number, None)
        seat.kill()

    # Errors of the user's code.

    def raised(self, message: Message, snapshot: Callable[[], memoryview]) -> LockstepError:
        """The error that a worker has reported. The state before a loss that is not finite is
        kept, if it is sound itself.

        Nobody rests, and yet nobody writes to the state: whoever computes has passed the commit of
        the step before, so that is whole, and the others cannot use this step's gradients before
        this worker's are there. Some may not have digested the step before: that is made up for.
        """
        error = from_message(message["error"])
        self.history.drain()
        step: int = message["step"]
        self.sink.event("failed", step=step, error=error.what.splitlines()[0])
        if isinstance(error, NonFiniteError) and step == self.history.in_flight():
            self.history.mend(step)
            state = snapshot()
            assert self.host.layout is not None
            broken = non_finite_tensors(self.host.layout, state)
            if broken:
                self.sink.event("not_saved", step=step, tensors=broken[:5])
            else:
                self.sink.checkpoint(step, state)
        return error
