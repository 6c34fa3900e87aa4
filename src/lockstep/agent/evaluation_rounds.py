"""Evaluation, an agent's end: held-out batches go to the workers, what they make of them comes
back. The same for predictions.

The state is at rest meanwhile. When a worker dies, its successors do the batches that are missing;
what other hosts have not answered when they are lost, the master's own workers do.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from lockstep.agent import membership
from lockstep.errors import TaskError
from lockstep.planning.eval_batches import Outputs, combine, gather
from lockstep.planning.worker_messages import InferBatches, Scored, ScoreOutputs

if TYPE_CHECKING:
    from lockstep.agent.worker_group import WorkerGroup

Inferred = Literal["evaluate", "predict"]
"""What is made of a held-out batch: its metrics, or its predictions."""

SCORE_SECONDS = 300.0
"""The longest that `Task.score` and `Task.baseline` may take together."""


class Evaluation:
    """What a crew does between two rests to evaluate. It hands on the workers' answers."""

    def __init__(self, worker_group: WorkerGroup) -> None:
        self.worker_group = worker_group
        self._round = 0
        self._results: dict[int, Any] = {}
        self._scored: Scored | None = None

    def batch_done(self, round: int, batch: int, result: Any) -> None:
        """Take what was made of a batch; an answer to an earlier question is dropped."""
        if round == self._round:
            self._results[batch] = result

    def scored(self, message: Scored) -> None:
        """Take the scores; an answer to an earlier question is dropped."""
        if message.round == self._round:
            self._scored = message

    def run(self) -> dict[str, float]:
        """The held-out metrics of the state at rest."""
        shell, plan = self.worker_group, self.worker_group.plan
        results = self.divide("evaluate", range(plan.eval_batches))
        while True:
            scored = self._score(shell.members.formed[0], gather(results))
            if scored is not None:
                return {**combine(results), **scored}
            shell.await_rest()

    def divide(self, what: Inferred, batches: Sequence[int]) -> list[Any]:
        """What the workers make of each batch, in order; each batch is done by one of them."""
        shell = self.worker_group
        self._results.clear()
        others = True
        while missing := [batch for batch in batches if batch not in self._results]:
            shell.await_rest()
            self._round += 1
            self._ask(what, shell.share_out(what, self._round, missing) if others else missing)
            shell.await_rest()
            shell.failures.evaluating = False
            shell.gather()
            others = False  # what other hosts have not answered is done here
        shell.failures.evaluated()
        return [self._results[batch] for batch in batches]

    def _ask(self, what: Inferred, batches: Sequence[int]) -> None:
        """Divide batches among those who rest, and wait until they have done them, or one died."""
        shell = self.worker_group
        worker_ids, epoch = shell.members.formed, shell.control.epoch
        shell.failures.evaluating = True
        for rank, worker_id in enumerate(worker_ids):
            shell.control.forget_shard(worker_id)
            request = InferBatches(
                round=self._round,
                predict=what == "predict",
                batches=tuple(batches[rank :: len(worker_ids)]),
            )
            shell.tell(worker_id, request)
        shell.decide(membership.WorkersResumed())
        while shell.control.epoch == epoch and not shell.members.all_rest:
            shell.listen()
            shell.watch()

    def _score(self, worker_id: int, outputs: Outputs) -> dict[str, float] | None:
        """The metrics of all outputs together, and at the end the baseline; None: `worker_id`
        died."""
        shell = self.worker_group
        epoch, ends = shell.control.epoch, shell.step >= shell.plan.steps
        if not outputs and not ends:
            return {}
        self._scored = None
        request = ScoreOutputs(round=self._round, outputs=json.dumps(outputs), baseline=ends)
        shell.tell(worker_id, request)
        limit = time.monotonic() + SCORE_SECONDS
        while shell.control.epoch == epoch and self._scored is None:
            shell.listen()
            shell.failures.kill_stopped(worker_id)
            if time.monotonic() > limit:
                raise TaskError(
                    "Task.score or Task.baseline does not return",
                    expected=f"an answer within {SCORE_SECONDS:.0f} s",
                    fix="do the work that can be divided in Task.outputs",
                )
        if self._scored is None:
            return None
        if self._scored.baseline:
            shell.observer.event("baseline", metrics=self._scored.baseline)
        return self._scored.metrics
