"""The figures of docs/applications.md: each recipe's bits, and the curve of a run.

    python -m benchmarks.applications bits [RECIPE …]
    python -m benchmarks.applications curve RUN METRIC FILE.svg
    python -m benchmarks.applications scores RUN
    python -m benchmarks.applications samples RUN

`bits` runs a few steps of each recipe on one, two and three workers, and on three of which one is
killed. Of a finished run, `curve` draws a held-out metric with its baseline, `scores` are its rows
of the page's first table, and `samples` what a recipe on texts writes of its held-out ones.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import lockstep
from lockstep.job.faults import Fault
from lockstep.job.task_resolution import resolve
from lockstep.recipes.text.rewriting import Rewriting
from lockstep.results.result import Result

RECIPES: dict[str, dict[str, Any]] = {
    "mnist": {"model": "cnn"},
    "vision": {},
    "recommend": {},
    "clicks": {},
    "game": {},
    "cartpole": {},
    "translate": {},
    "summarise": {},
}
"""The recipes, and the arguments with which the page shows them."""
STEPS, SHARDS = 40, 3


def bits(name: str) -> list[tuple[str, str]]:
    """`(workers, fingerprint)` of each run of the first steps of a recipe."""
    killed = (Fault(worker_id=1, step=STEPS // 2, phase="backward"),)
    runs = [("1", 1, ()), ("2", 2, ()), ("3", 3, ()), ("3, one killed", 3, killed)]
    found = []
    for label, workers, faults in runs:
        with tempfile.TemporaryDirectory() as folder:
            result = lockstep.run(
                name, args=RECIPES[name], steps=STEPS, shards=SHARDS, threads=1, workers=workers,
                faults=faults, evaluate=False, out=f"{folder}/run", quiet=True,
                stall_seconds=600,
            )  # fmt: skip
            recoveries = [one["how"] for one in result.recoveries]
            assert recoveries == ["was killed by SIGKILL"] * len(faults), recoveries
            found.append((label, result.fingerprint))
    return found


def curve(run: Path, metric: str) -> str:
    """A validation metric over the data epochs of a run, and its baseline, as SVG."""
    from pygal import XY
    from pygal.style import Style

    result = json.loads((run / "result.json").read_text())
    steps = result["history"][0]["step"]
    points = [(entry["step"] / steps, entry["metrics"][metric]) for entry in result["history"]]
    beside = result.get("baseline", {}).get(metric)
    values = [value for _, value in points] + ([] if beside is None else [beside])
    margin = (max(values) - min(values)) / 20
    style = Style(
        background="white", plot_background="white", guide_stroke_color="#ddd",
        major_guide_stroke_color="#ddd", colors=("#1f6f8b", "#b3541e"),
    )  # fmt: skip
    plot = XY(
        js=[], style=style, disable_xml_declaration=True, width=640, height=300, dots_size=3,
        explicit_size=True, min_scale=4, max_scale=6, legend_at_bottom=True, truncate_legend=-1,
        range=(min(values) - margin, max(values) + margin), x_title="data epochs",
        y_title=f"held-out {metric}", value_formatter="{:.3g}".format,
        x_value_formatter="{:g}".format,
    )  # fmt: skip
    plot.add(f"{metric}: {points[-1][1]:.4g}", points)
    if beside is not None:
        line = [(points[0][0], beside), (points[-1][0], beside)]
        plot.add(f"baseline: {beside:.4g}", line, show_dots=False)
    drawn: str = plot.render(is_unicode=True)
    return re.sub(r"<!--.*?-->", "", drawn)


def scores(run: Path) -> list[str]:
    """A row for each metric that has a baseline, and what the whole run took."""
    result = Result.open(run)
    assert result.source is not None
    rows = [
        f"| `{result.source.label}` | {name} | {result.metrics[name]:.4f} | {beside:.4f} |"
        for name, beside in result.baseline.items()
    ]
    return [*rows, f"{result.steps} steps, {result.wall_seconds:.0f} s, `{result.fingerprint}`"]


EVERY, LONGEST = 50, 40
"""Which held-out texts are shown, and how many words of each."""


def samples(run: Path) -> list[str]:
    """A row for every fiftieth held-out pair: its source, what is written, and its target."""
    result = Result.open(run)
    assert result.source is not None
    task, _ = resolve(result.source)
    assert isinstance(task, Rewriting)
    shown = task.split.held_out[EVERY // 2 :: EVERY]
    written = task.predict(result.model(), [source for source, _ in shown])
    return [
        "| " + " | ".join(map(_cell, (source, row["text"], target))) + " |"
        for (source, target), row in zip(shown, written, strict=True)
    ]


def _cell(text: str) -> str:
    """A text in a table: of a long one the beginning."""
    words = text.split()
    shown = " ".join(words[:LONGEST]) + (" …" if len(words) > LONGEST else "")
    return re.sub(r"([|*_<`])", r"\\\1", shown)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["bits", *names]:
            for name in names or RECIPES:
                for label, fingerprint in bits(name):
                    print(f"| {name} | {label} | `{fingerprint}` |", flush=True)
        case ["curve", run, metric, file]:
            Path(file).write_text(curve(Path(run), metric))
        case ["scores", run]:
            print(*scores(Path(run)), sep="\n")
        case ["samples", run]:
            print(*samples(Path(run)), sep="\n")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
