"""Barrier among a host's workers: progress words, a short spin, then a futex."""

from __future__ import annotations

import time
from collections.abc import Sequence

from lockstep.state.control_segment import ControlSegment
from lockstep.system import futex
from lockstep.system.machine import cores
from lockstep.system.spin_budget import SpinBudget

NAP = 0.02
"""Seconds: the longest single sleep before the epoch and the parent are looked at again."""
SPINS = 20_000
"""Looks at a word before sleeping, where every worker has a core: about a millisecond, more than
workers usually differ by. A core that has gone to sleep takes up to 0.1 ms to wake in a virtual
machine, which short steps would pay at each meeting."""


class Regroup(Exception):
    """The membership epoch has changed: stop at this barrier and ask the agent."""


class Barrier:
    """One worker's end of the barrier among `worker_ids`.

    Every wait ends: with everybody there, with `Regroup` once the agent has raised the epoch
    (it does so when a worker dies or stalls), or with the process itself, which the kernel kills
    when its parent dies.
    """

    def __init__(
        self,
        control: ControlSegment,
        worker_id: int,
        worker_ids: Sequence[int],
        epoch: int,
        threads: int = 1,
    ) -> None:
        self.control, self.worker_id, self.epoch = control, worker_id, epoch
        self.others = [other for other in worker_ids if other != worker_id]
        self.crowded = len(worker_ids) * threads > cores()
        """Whether there are more workers than cores: then nobody spins."""
        self._budget = SpinBudget(1 if self.crowded else SPINS)

    def arrive(self, progress: int, *, notify: bool = False) -> None:
        """Publish this worker's progress. `notify`: the exchange thread waits for it, too."""
        self.control.set_progress(self.worker_id, progress)
        if self.others:
            futex.wake(self.control.progress_address(self.worker_id))
        if notify:
            self.control.notify()

    def wait(self, progress: int) -> None:
        """Return when every other worker has reached `progress`.

        Raises:
            Regroup: the agent has changed the membership.
        """
        control = self.control
        if not self.others and control.epoch != self.epoch:
            raise Regroup  # a lone worker waits for nobody who could hold it up
        for other in self.others:
            if control.progress(other) < progress:
                self._await(other, progress)

    def _await(self, other: int, progress: int) -> None:
        """Return when another worker has come so far: by looking, and then by sleeping."""
        control, spins, begun = self.control, self._budget.spins, time.perf_counter()
        while (seen := control.progress(other)) < progress:
            if control.epoch != self.epoch:
                raise Regroup
            if spins:
                spins -= 1
                continue
            futex.wait(control.progress_address(other), seen, NAP)
        self._budget.learn(time.perf_counter() - begun)

    def await_exchange(self, word: int) -> None:
        """Return when the exchange between hosts has come so far. This worker has done its part.

        Raises:
            Regroup: the agent has changed the membership.
        """
        control = self.control
        control.await_exchange(self.worker_id, word)
        control.notify()
        while (seen := control.exchanged) < word:
            if control.epoch != self.epoch:
                raise Regroup
            futex.wait(control.exchange_address, seen, NAP)
