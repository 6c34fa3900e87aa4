"""Chart of the README: throughput beside DistributedDataParallel, from `benchmarks/results.json`.

    python -m benchmarks.chart docs/pictures/benchmarks.svg

A bar is the median of the repetitions, as a multiple of the faster DDP's, with the least and the
greatest; which of the two is faster, and what else was measured, is in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import DDP, best, pairwise, typical

RESULTS = Path(__file__).with_name("results.json")
WIDTH, LEFT, RIGHT, TOP, ROW, BAR = 760, 110, 170, 46, 34, 18
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #24292f } .soft { fill: #59636e }
.bar { fill: #3b73b9 } .spread { stroke: #24292f; stroke-width: 1.5 }
.one { stroke: #59636e; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .soft { fill: #9198a1 } .bar { fill: #6ea3e0 }
  .spread { stroke: #e6edf3 } .one { stroke: #9198a1 }
}
"""


def chart(results: Mapping[str, Any]) -> str:
    """The chart, as SVG."""
    rows = list(_rows(results["speed"]))
    height = TOP + ROW * len(rows) + 14
    most = max(high for _, _, _, high, _ in rows)
    scale = (WIDTH - LEFT - RIGHT) / most
    machine = results["machine"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Throughput beside DistributedDataParallel"><style>{STYLE}</style>',
        f'<text x="0" y="16">Throughput of Lockstep, as a multiple of DistributedDataParallel\'s'
        f'</text><text x="0" y="36" class="soft">samples/s beside it; {machine["cores"]} cores, '
        f"{machine['processor'].partition(' (')[0]}, PyTorch {machine['torch']}</text>",
    ]
    for number, (name, low, middle, high, rate) in enumerate(rows):
        y = TOP + ROW * number
        base, end = y + (ROW + BAR) / 2 - 4, LEFT + scale * high
        centre = y + ROW / 2
        parts += [
            f'<text x="{LEFT - 10}" y="{base:.0f}" text-anchor="end">{name}</text>',
            f'<rect class="bar" x="{LEFT}" y="{centre - BAR / 2:.0f}" '
            f'width="{scale * middle:.1f}" height="{BAR}"/>',
            f'<line class="spread" x1="{LEFT + scale * low:.1f}" x2="{end:.1f}" '
            f'y1="{centre:.0f}" y2="{centre:.0f}"/>',
            f'<text x="{end + 10:.0f}" y="{base:.0f}">{middle:.2f}'
            f'<tspan class="soft" dx="8">{rate:,.0f}/s</tspan></text>',
        ]
    one = LEFT + scale
    parts.append(
        f'<line class="one" x1="{one:.1f}" x2="{one:.1f}" y1="{TOP}" y2="{height - 12}"/></svg>\n'
    )
    return "\n".join(parts)


def _rows(speed: Mapping[str, Any]) -> Iterator[tuple[str, float, float, float, float]]:
    """Of each model: its name, the least, the median and the greatest ratio, and the rate."""
    for model, measured in speed.items():
        rates = measured["rates"]
        ratio, rate = pairwise(rates, "lockstep", best(rates, DDP)), typical(rates, "lockstep")
        if ratio is not None and rate is not None:
            yield model, ratio.low, ratio.middle, ratio.high, rate


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(chart(json.loads(RESULTS.read_text())))
