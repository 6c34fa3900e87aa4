"""Decision check: whether a run has done what its metrics decide, by its own ledger."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

from lockstep.errors import IntegrityError
from lockstep.planning.metric_decisions import Evaluation, Monitor, best_of, early_end, stop_reason
from lockstep.planning.plan import Plan
from lockstep.results.ledger import Line, evaluations_of
from lockstep.results.run_folder import RunFolder


def check_decisions(folder: RunFolder, plan: Plan, lines: Sequence[Line]) -> None:
    """Make the decisions of a run again, from the evaluations in its ledger.

    Raises:
        IntegrityError: the run has ended elsewhere, or its result says something else.
    """
    monitor, evaluations = Monitor.of(plan), evaluations_of(lines)
    if monitor is None:
        return
    _check_order(folder, lines)
    early = early_end(evaluations, monitor)
    end = plan.steps if early is None else early
    early = None if early == plan.steps else early  # it has come to its end all the same
    found = max(line.after for line in lines)
    if found > end or ("end" in lines[-1].content and found != end):
        raise IntegrityError(
            f"{folder.ledger_path} does not end where its metrics say",
            expected=f"an end after step {end}"
            + ("" if early is None else f": {_reason_at(evaluations, monitor, early)}"),
            found=f"step {found}",
            fix="it was altered; use a copy of it",
        )
    if folder.result_path.is_file():
        _check_result(folder, monitor, evaluations, early)


def _check_order(folder: RunFolder, lines: Sequence[Line]) -> None:
    """Every evaluation comes right after its step."""
    for before, line in itertools.pairwise(lines):
        if "evaluated" in line.content and (
            "evaluated" in before.content or before.after != line.after
        ):
            raise IntegrityError(
                f"{folder.ledger_path} has an evaluation in the wrong place",
                expected=f"step {line.after - 1} before the evaluation after step {line.after}",
                found=json.dumps(before.content)[:200],
                fix="it was altered; use a copy of it",
            )


def _reason_at(evaluations: Sequence[Evaluation], monitor: Monitor, step: int) -> str:
    return stop_reason([each for each in evaluations if each.step <= step], monitor)


def _check_result(
    folder: RunFolder, monitor: Monitor, evaluations: Sequence[Evaluation], early: int | None
) -> None:
    result: dict[str, Any] = json.loads(folder.result_path.read_text())
    expected = "" if early is None else _reason_at(evaluations, monitor, early)
    if result.get("stopped_early", "") != expected:
        raise _not_its_own(folder, "why it ended", expected, result.get("stopped_early"))
    best = result.get("best")
    if best is None:
        return
    # A better state may have had no checkpoint: the disk was full.
    among = [int(name.removeprefix("step-")) for name in result["checkpoints"]]
    wanted = best_of(evaluations, monitor, among)
    if wanted is None or (best["step"], best["value"]) != (wanted.step, monitor.value(wanted)):
        raise _not_its_own(folder, "which state is the best", wanted, best)


def _not_its_own(folder: RunFolder, what: str, expected: Any, found: Any) -> IntegrityError:
    return IntegrityError(
        f"{folder.result_path} says something else than the ledger of {what}",
        expected=f"{expected!r}",
        found=f"{found!r}",
        fix="it was altered; use a copy of it",
    )
