"""Evaluation, the master's end: held-out batches go to the workers, their sums come back.

The state is at rest meanwhile. When a worker dies, its successors begin again.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from lockstep import membership
from lockstep.channel import Message
from lockstep.errors import TaskError
from lockstep.evaluate import BatchSums, Outputs, batch_count, combine, gather

if TYPE_CHECKING:
    from lockstep.coordinator import Coordinator

SCORE_SECONDS = 300.0
"""The longest that `Task.score` and `Task.baseline` may take together."""


class Evaluation:
    """What a coordinator does between two rests to evaluate. It hands on the workers' answers."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self._round = 0
        self._results: dict[int, list[BatchSums]] = {}
        self._scored: Message | None = None

    def heard(self, seat: int, message: Message) -> None:
        """Take an answer, `evaluated` or `scored`; one to an earlier question is dropped."""
        if message["round"] != self._round:
            return
        if message["event"] == "evaluated":
            self._results[seat] = message["results"]
        else:
            self._scored = message

    def run(self) -> dict[str, float]:
        """The held-out metrics of the state at rest; each batch by one worker."""
        shell = self.coordinator
        while True:
            shell.await_rest()
            complete = self._evaluate()
            shell.await_rest()
            shell.failures.evaluating = False
            if complete:
                shell.failures.evaluated()
                results = [item for part in self._results.values() for item in part]
                scored = self._score(shell.members.formed[0], gather(results))
                if scored is not None:
                    return {**combine(results), **scored}

    def _evaluate(self) -> bool:
        """Divide the batches, and wait; whether all were evaluated by those who were asked."""
        shell, plan = self.coordinator, self.coordinator.plan
        seats, epoch = shell.members.formed, shell.control.epoch
        total = batch_count(plan.eval_samples, plan.eval_batch_size)
        self._round += 1
        self._results.clear()
        shell.failures.evaluating = True
        for rank, seat in enumerate(seats):
            shell.control.forget_shard(seat)
            batches = list(range(rank, total, len(seats)))
            shell.tell(seat, {"op": "evaluate", "round": self._round, "batches": batches})
        shell.decide(membership.Resumed())
        while shell.control.epoch == epoch and len(self._results) < len(seats):
            shell.listen()
            shell.watch()
        return shell.control.epoch == epoch

    def _score(self, seat: int, outputs: Outputs) -> dict[str, float] | None:
        """The metrics of all outputs together, and at the end the baseline; None: `seat` died."""
        shell = self.coordinator
        epoch, ends = shell.control.epoch, shell.step >= shell.plan.steps
        if not outputs and not ends:
            return {}
        self._scored = None
        message = {"op": "score", "round": self._round, "outputs": outputs, "baseline": ends}
        shell.tell(seat, message)
        limit = time.monotonic() + SCORE_SECONDS
        while shell.control.epoch == epoch and self._scored is None:
            shell.listen()
            shell.failures.kill_stopped(seat)
            if time.monotonic() > limit:
                raise TaskError(
                    "Task.score or Task.baseline does not return",
                    expected=f"an answer within {SCORE_SECONDS:.0f} s",
                    fix="do the work that can be divided in Task.outputs",
                )
        if self._scored is None:
            return None
        if self._scored["baseline"]:
            shell.sink.event("baseline", metrics=self._scored["baseline"])
        metrics: dict[str, float] = self._scored["metrics"]
        return metrics
