"""Time sampler: what a host's workers spend their time on, told once a second.

Workers add up their seconds in the control segment in any case; the agent looks at the sums at its
ticks, so nothing is asked of a worker. How much memory each has of its own is read from /proc. The
wait for other hosts has no sum of its own: its part of what was spent on reducing and updating is
that of the looks that met a worker waiting for it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from lockstep.agent.observer import RunObserver
from lockstep.results.event_schema import Seconds
from lockstep.state.control_segment import ControlSegment, Stat

SAMPLE_SECONDS = 1.0
"""The shortest time between two samples."""


class TimeSampler:
    """Tells the observer, as the event `timed`, on what the workers have spent their time."""

    def __init__(
        self,
        control: ControlSegment,
        host: str,
        observer: RunObserver,
        clock: Callable[[], float] = time.monotonic,
        memory_of: Callable[[int], int] = lambda _: 0,
    ) -> None:
        """`memory_of`: how many bytes a worker has of its own; 0: that cannot be said."""
        self._memory_of = memory_of
        self._control, self._host, self._observer, self._clock = control, host, observer, clock
        self._begun = clock()
        """When the last sample was taken."""
        self._before = control.seconds.tolist()
        self._looks = 0
        self._waiting: Counter[int] = Counter()
        """By worker: how many of these looks met it waiting for other hosts."""

    def look(self, worker_ids: Iterable[int]) -> None:
        """Look at the workers; where it is time, and one of them has finished something, tell."""
        control, now = self._control, self._clock()
        self._looks += 1
        for worker_id in worker_ids:
            if control.awaited_exchange(worker_id) > control.exchanged:
                self._waiting[worker_id] += 1
        if now - self._begun >= SAMPLE_SECONDS:
            self._sample(now)

    def flush(self) -> None:
        """Tell what there is: the workers rest, or have ended."""
        self._looks += 1
        self._sample(self._clock())

    def _sample(self, now: float) -> None:
        sums = self._control.seconds.tolist()
        if sums == self._before:
            return  # a long step: it is told when it has ended
        workers = {
            str(worker_id): seconds_between(before, after, self._waiting[worker_id] / self._looks)
            for worker_id, (before, after) in enumerate(zip(self._before, sums, strict=True))
            if before != after  # also one that has died since
        }
        memory = {worker: size for worker in workers if (size := self._memory_of(int(worker)))}
        self._observer.event(
            "timed", host=self._host, seconds=round(now - self._begun, 4), workers=workers,
            **({"memory": memory} if memory else {}),
        )  # fmt: skip
        self._begun, self._before = now, sums
        self._looks = 0
        self._waiting.clear()


def seconds_between(before: list[float], after: list[float], waiting: float) -> list[float]:
    """What a worker has spent its time on between two readings of its sums (see `Stat`).

    `waiting` is the part of the time, 0 to 1, in which it was seen waiting for other hosts.
    """
    spent = {stat: max(after[stat] - before[stat], 0.0) for stat in Stat}
    exchange = min(waiting * sum(spent.values()), spent[Stat.REDUCE] + spent[Stat.UPDATE])
    reducing = max(spent[Stat.REDUCE] - exchange, 0.0)
    updating = spent[Stat.UPDATE] - max(exchange - spent[Stat.REDUCE], 0.0)
    row = Seconds(
        compute=spent[Stat.COMPUTE],
        data=spent[Stat.DATA],
        wait=spent[Stat.WAIT],
        reduce=reducing,
        exchange=exchange,
        update=updating,
        evaluate=spent[Stat.EVALUATE],
    )
    return [round(getattr(row, name), 4) for name in row.__struct_fields__]
