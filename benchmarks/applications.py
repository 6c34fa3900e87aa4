"""The figures of docs/applications.md: each recipe's bits, and the curve of a run.

    python -m benchmarks.applications bits [RECIPE …]
    python -m benchmarks.applications curve RUN METRIC FILE.svg

`bits` runs a few steps of each recipe on one, two and three workers, and on three of which one is
killed. `curve` draws a held-out metric of a finished run, with its baseline.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import lockstep
from lockstep.faults import Fault

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
    killed = (Fault(seat=1, step=STEPS // 2, phase="backward"),)
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
    """A held-out metric over the data epochs of a run, beside its baseline, as SVG."""
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


def main(arguments: list[str]) -> None:
    match arguments:
        case ["bits", *names]:
            for name in names or RECIPES:
                for label, fingerprint in bits(name):
                    print(f"| {name} | {label} | `{fingerprint}` |", flush=True)
        case ["curve", run, metric, file]:
            Path(file).write_text(curve(Path(run), metric))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
