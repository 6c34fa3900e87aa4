"""Charts: curves as SVG, drawn by pygal; long series are reduced to a few hundred points."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

POINTS = 600
"""The most points of a curve; an even number."""
LARGEST, SMALLEST = 1e100, 1e-100
"""Limits of drawn numbers: larger ones are left out, and if all are smaller, 0 is drawn instead."""
MOST_STEPS = 1e15


def drawable(value: float) -> bool:
    """Whether `value` can be drawn: it is finite and at most `LARGEST`."""
    return math.isfinite(value) and abs(value) <= LARGEST


def figure(value: float) -> str:
    """A number for people: four significant digits, or all digits of a whole number."""
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1000 and abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}"


@dataclass(slots=True)
class Bin:
    """Bin: consecutive steps, with the sum and the range of their losses."""

    first: int
    last: int
    count: int
    total: float
    low: float
    high: float

    def absorb(self, other: Bin) -> None:
        """Merge the bin that follows into this one."""
        self.last = other.last
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


@dataclass(slots=True)
class Curve:
    """Curve: losses in at most `POINTS` bins, for any number of steps.

    When the bins are full, neighbours are merged, and bins hold twice as many steps from then on.
    """

    bins: list[Bin] = field(default_factory=list)
    width: int = 1
    steps: int = 0
    skipped: int = 0

    def add(self, step: int, loss: float) -> None:
        """Add the loss of the next step."""
        self.steps += 1
        if not drawable(loss):
            self.skipped += 1
            return
        new = Bin(step, step, 1, loss, loss, loss)
        if self.bins and self.bins[-1].count < self.width:
            self.bins[-1].absorb(new)
            return
        if len(self.bins) == POINTS:
            self._halve()
        self.bins.append(new)

    def _halve(self) -> None:
        for left, right in zip(self.bins[::2], self.bins[1::2], strict=True):
            left.absorb(right)
        self.bins = self.bins[::2]
        self.width *= 2


def chart(
    points: Sequence[tuple[float, float]],
    band: Sequence[tuple[float, float]] = (),
    *,
    size: tuple[int, int],
) -> str:
    """A chart of `points`, and of a filled `band`, over steps: SVG without scripts or styles.

    Without points it is empty. Only numbers go in, so that the SVG is safe. The page's style sheet
    colours it; pygal's own scripts and styles are removed.
    """
    if not points:
        return ""
    from markupsafe import Markup
    from pygal import XY
    from pygal.style import Style

    points, band = _spread(points, band)
    low, high = min(y for _, y in points), max(y for _, y in points)
    plot = XY(
        js=[], css=[], style=Style(label_font_size=12, title_font_size=12),
        disable_xml_declaration=True, width=size[0], height=size[1], margin=4, spacing=6,
        min_scale=4, max_scale=8, include_x_axis=0 <= low < high / 2, show_legend=False,
        x_value_formatter=figure, value_formatter=figure, dots_size=3, truncate_label=-1,
        x_title="step",
    )  # fmt: skip
    plot.add(None, band, fill=True, show_dots=False)
    plot.add(None, points, show_dots=len(points) <= 60)
    svg: str = plot.render()
    svg = re.sub(r"<!--.*?-->|<defs>.*?</defs>|<title>Pygal</title>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<desc class="value">(.*?)</desc>', r"<title>\1</title>", svg)
    svg = re.sub(r"<desc\b.*?</desc>", "", svg)
    return Markup(re.sub(r"<svg[^>]*>", f'<svg viewBox="0 0 {size[0]} {size[1]}">', svg, count=1))


def _spread(*outlines: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The outlines, with values made equal that differ by less than a chart can show.

    pygal loops forever over the ticks of a scale whose ends differ by a few units in the last
    place, as those of a metric that has converged.
    """
    values = [y for outline in outlines for _, y in outline]
    low, high = min(values), max(values)
    size = max(abs(low), abs(high))
    if size < SMALLEST or high - low < 1e-9 * size:
        middle = low if size >= SMALLEST else 0.0
        return [[(x, middle) for x, _ in outline] for outline in outlines]
    return [list(outline) for outline in outlines]


class Panel(NamedTuple):
    """Panel: a chart (SVG) with a heading, the last value and a note."""

    title: str
    value: str
    chart: str
    note: str


def loss_panel(ledger: Iterable[Mapping[str, Any]]) -> Panel:
    """The panel of the training loss. `ledger`: the ledger's entries, which are read once."""
    curve, last = Curve(), math.nan
    for entry in ledger:
        step, loss = _step(entry), hex_float(entry.get("loss"))
        if step is not None:
            curve.add(step, loss)
            last = loss
    mean = [((b.first + b.last) / 2, b.total / b.count) for b in curve.bins]
    band: list[tuple[float, float]] = []
    notes = []
    if curve.width > 1:
        middle = [(x, b) for (x, _), b in zip(mean, curve.bins, strict=True)]
        band = [(x, b.high) for x, b in middle] + [(x, b.low) for x, b in reversed(middle)]
        notes.append(f"Line: mean of {curve.width} steps. Band: their minimum and maximum.")
    if curve.skipped:
        notes.append(
            f"{curve.skipped:,} steps without a finite loss, or with a huge one, are not drawn."
        )
    value = f"{figure(last)} at the last step" if curve.steps else ""
    return Panel("Training loss", value, chart(mean, band, size=(1000, 280)), " ".join(notes))


def metric_panels(history: Iterable[Any]) -> list[Panel]:
    """A panel for each held-out metric, in the order in which they first appear."""
    points: dict[str, list[tuple[float, float]]] = {}
    dropped: dict[str, int] = {}
    for entry in map(mapping, history):
        step = _step(entry)
        for name, value in mapping(entry.get("metrics")).items():
            series, shown = points.setdefault(name, []), number(value)
            if step is None or shown is None:
                dropped[name] = dropped.get(name, 0) + 1
            else:
                series.append((step, shown))
    panels = []
    for name, series in points.items():
        value = f"{figure(series[-1][1])} at step {figure(series[-1][0])}" if series else ""
        lost = dropped.get(name, 0)
        note = (
            f"{lost:,} values that are not finite numbers, or huge, are not drawn." if lost else ""
        )
        every = max(1, -(-len(series) // POINTS))
        kept = series[::-every][::-1]  # keeps the last
        panels.append(Panel(name, value, chart(kept, size=(490, 220)), note))
    return panels


def number(value: Any) -> float | None:
    """`value` if it is a number that can be drawn, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if drawable(result) else None


def _step(entry: Mapping[str, Any]) -> int | None:
    """The step of an entry of the ledger or of the history; None if it has none."""
    step = number(entry.get("step"))
    return int(step) if step is not None and 0 <= step <= MOST_STEPS else None


def hex_float(value: Any) -> float:
    """The loss of a ledger's line; NaN if it is missing or not a number."""
    try:
        return float.fromhex(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}
