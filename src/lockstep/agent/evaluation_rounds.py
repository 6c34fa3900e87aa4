"""Evaluation rounds: held-out batches go to the workers, and what they make of them comes back.

The same for predictions. The state is at rest meanwhile. When a worker dies, its successors do the
batches that are missing; what other hosts have not answered when they are lost, this host does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

from lockstep.agent import membership
from lockstep.agent.answer_chunks import BatchResult
from lockstep.agent.worker_group import WorkerGroup
from lockstep.errors import TaskError
from lockstep.planning.eval_batches import BatchSums, Outputs, combine, gather
from lockstep.planning.teams import batches_together, team_count, team_of
from lockstep.planning.worker_messages import InferBatches, Scored, ScoreOutputs

Inferred = Literal["evaluate", "predict"]
"""What is made of a held-out batch: its metrics, or its predictions."""


class RoundDisturbed(Exception):
    """Hosts that compute batches together have to be regrouped first."""


SCORE_SECONDS = 300.0
"""The longest that `Task.score` and `Task.baseline` may take together."""


class EvaluationShare(Protocol):
    """How the batches of a round are divided among hosts."""

    def share_out(self, what: Inferred, number: int, batches: Sequence[int]) -> list[int]:
        """Give other hosts their part of the batches, under the number of a round; the rest."""

    def gather(self) -> None:
        """Wait for what other hosts have made of theirs; it goes to the group's answers."""

    def disturbed(self) -> bool:
        """Whether a host with which batches are computed cannot go on."""


class OwnShare:
    """All batches are done on this host, or by each host together with this one."""

    def __init__(self, disturbed: Callable[[], bool] = lambda: False) -> None:
        """`disturbed`: whether a host with which batches are computed cannot go on."""
        self.disturbed = disturbed

    def share_out(self, what: Inferred, number: int, batches: Sequence[int]) -> list[int]:
        return list(batches)

    def gather(self) -> None:
        pass


class EvaluationRounds:
    """What a worker group does between two rests to evaluate, or to predict."""

    def __init__(self, group: WorkerGroup, share: EvaluationShare) -> None:
        self._group, self._share = group, share
        self._round = 0
        self._results: dict[int, Any] = {}

    def evaluate(self) -> dict[str, float]:
        """The held-out metrics of the state at rest."""
        group = self._group
        results = self.divide("evaluate", range(group.plan.eval_batches))
        while True:
            ends = group.step >= group.plan.steps
            scored = self._score(group.members.formed[0], gather(results), ends=ends)
            if scored is not None:
                return {**combine(results), **scored}
            group.await_rest()

    def evaluate_one(self) -> BatchSums:
        """Evaluate the first held-out batch, for its errors and its metrics' names. `Task.score` is
        not tried: it may need all of the held-out set."""
        (found,) = self.divide("evaluate", range(1))
        return found  # type: ignore[no-any-return]

    def baseline(self) -> None:
        """Have the baseline computed, where the run ends before its last step."""
        group = self._group
        while self._score(group.members.formed[0], {}, ends=True) is None:
            group.await_rest()

    def divide(self, what: Inferred, batches: Sequence[int]) -> list[Any]:
        """What the workers make of each batch, in order; each batch is done by one of them, or by a
        team.

        Raises:
            RoundDisturbed: hosts compute them together, and have to be regrouped first.
        """
        group = self._group
        self._results.clear()
        others = True
        while missing := [batch for batch in batches if batch not in self._results]:
            group.await_rest()
            self._round += 1
            own = self._share.share_out(what, self._round, missing) if others else missing
            self._ask(what, own)
            if group.role.together and not group.at_rest:
                group.failure_log.evaluating = False
                raise RoundDisturbed
            group.await_rest()
            group.failure_log.evaluating = False
            self._share.gather()
            self._take_answers()
            others = False  # what other hosts have not answered is done here
        group.failure_log.evaluated()
        return [self._results[batch] for batch in batches]

    def take_part(self, what: Inferred, batches: Sequence[int]) -> None:
        """Compute batches together with other hosts, of which one answers."""
        group = self._group
        group.await_rest()
        self._ask(what, batches)
        group.failure_log.evaluating = False
        if group.at_rest:
            group.failure_log.evaluated()

    def _ask(self, what: Inferred, batches: Sequence[int]) -> None:
        """Divide batches among those who rest, and wait until they have done them, or one died."""
        group = self._group
        worker_ids, epoch = group.members.formed, group.control.epoch
        group.failure_log.evaluating = True
        together = batches_together(len(batches), len(worker_ids), group.plan.team)
        size = group.plan.team if together else 1
        teams = team_count(len(worker_ids), size)
        if group.role.together:
            together, teams = True, group.role.placement.teams
        for rank, worker_id in enumerate(worker_ids):
            group.control.forget_shard(worker_id)
            index = team_of(rank, size)
            own = tuple(batches[index::teams]) if index < teams else ()
            request = InferBatches(
                round=self._round, predict=what == "predict", batches=own, together=together
            )
            group.tell(worker_id, request)
        group.decide(membership.WorkersResumed())
        while group.control.epoch == epoch and not group.members.all_rest:
            group.listen()
            group.watch()
            if group.role.together and self._share.disturbed():
                group.decide(membership.PauseRequested())  # who waits for partners gives up
                return

    def _answers(self) -> Iterator[BatchResult | Scored]:
        """The answers to the last question; those to an earlier one are dropped."""
        answers = self._group.answers
        while answers:
            answer = answers.popleft()
            if answer.round == self._round:
                yield answer

    def _take_answers(self) -> None:
        for answer in self._answers():
            if isinstance(answer, BatchResult):
                self._results[answer.batch] = answer.result

    def _score(self, worker_id: int, outputs: Outputs, *, ends: bool) -> dict[str, float] | None:
        """The metrics of all outputs together, and at the end the baseline; None: the worker that
        was asked has died."""
        group = self._group
        if not outputs and not ends:
            return {}
        request = ScoreOutputs(round=self._round, outputs=json.dumps(outputs), baseline=ends)
        group.tell(worker_id, request)
        scored = self._await_score(worker_id)
        if scored is None:
            return None
        if scored.baseline:
            group.observer.event("baseline", metrics=scored.baseline)
        return scored.metrics

    def _await_score(self, worker_id: int) -> Scored | None:
        """The worker's answer; None: it has died.

        Raises:
            TaskError: it does not answer.
        """
        group = self._group
        epoch, limit = group.control.epoch, time.monotonic() + SCORE_SECONDS
        while group.control.epoch == epoch:
            group.listen()
            for answer in self._answers():
                if isinstance(answer, Scored):
                    return answer
            group.failure_detector.kill_stopped(worker_id)
            if time.monotonic() > limit:
                raise TaskError(
                    "Task.score or Task.baseline does not return",
                    expected=f"an answer within {SCORE_SECONDS:.0f} s",
                    fix="do the work that can be divided in Task.outputs",
                )
        return None
