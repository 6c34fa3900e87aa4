"""Plan tables: what was considered for a plan, for people and as JSON."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep.api.training import Explanation
    from lockstep.api.tuning import Tried
    from lockstep.planning.ranking import Ranked

PARTS = ("compute", "wait", "reduce", "exchange", "update")
WIDTH = 120
"""Of the tables where stdout is no terminal."""
MOST_ROWS = 20


def ranking_message(explanation: Explanation) -> dict[str, Any]:
    """What was considered, JSON-ready. Times are seconds of a step, sizes bytes."""
    return {
        "candidates": [_row(each) for each in explanation.decision.ranked],
        "tried": [
            {
                "settings": dict(each.settings),
                "speedup": round(each.speedup, 3),
                "why_not": each.why_not,
                "best": None if each.best is None else _row(each.best),
            }
            for each in explanation.tried
        ],
        "planning_seconds": round(explanation.decision.planning_seconds, 3),
    }


def _row(ranked: Ranked) -> dict[str, Any]:
    prediction = ranked.prediction
    return {
        "workers": dict(prediction.candidate.workers),
        "predicted": prediction.seconds,
        "parts": {name: getattr(prediction.parts, name) for name in PARTS},
        "measured": ranked.measured,
        "memory": dict(prediction.memory),
        "missing": dict(prediction.missing),
        "reason": prediction.reason,
    }


def show_ranking(explanation: Explanation) -> None:
    """Print what was considered, the best first, and settings that would make it faster."""
    ranked = explanation.decision.ranked
    if not ranked:
        print("\nnothing was predicted: a shard of this job cannot be timed")
        return
    print(f"\nconsidered, in milliseconds a step (planned in "
          f"{explanation.decision.planning_seconds:.1f} s)")  # fmt: skip
    rows = [["plan", "step", *PARTS, "measured", "memory", ""]]
    for each in ranked[:MOST_ROWS]:
        prediction = each.prediction
        parts = [_ms(getattr(prediction.parts, name)) for name in PARTS]
        most = max(prediction.memory.values()) / 2**20
        measured = "" if each.measured is None else _ms(each.measured)
        rows.append([
            str(prediction.candidate), _ms(prediction.seconds), *parts, measured,
            f"{most:,.0f} MiB", prediction.reason,
        ])  # fmt: skip
    _show_table(rows)
    if explanation.tried:
        _show_tried(explanation.tried)


def _show_tried(tried: Sequence[Tried]) -> None:
    print("\nsettings that change the numbers, each with the best plan that is predicted for it")
    rows = [["setting", "speed", "plan", "step"]]
    for each in tried:
        words = each.line().replace("\n", ", ")
        if each.best is None:
            rows.append([words, "-", each.why_not, ""])
        else:
            best = each.best.prediction
            rows.append([words, f"{each.speedup:.2f} x", str(best.candidate), _ms(best.seconds)])
    _show_table(rows)
    worth = [each for each in tried if each.worth_it]
    if worth:
        print("\nto have other numbers sooner, put into the job file (one at a time):")
        for each in worth:
            print(f"  {each.line()}  # {each.speedup:.2f} times as fast, as predicted")
    else:
        print("\nnone of them is worth other numbers")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _show_table(rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(rows[0]):
        numbers = 1 <= index < len(rows[0]) - 1
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=numbers)
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=width, highlight=False, markup=False).print(table)
