"""Timeline chart: the lanes of a run's workers as SVG, for the report. Without scripts or styles.

The page draws the same rows while a run goes on (`dashboard/static/timeline.js`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lockstep.results.run_history import PHASES, RunHistory, thin_times

if TYPE_CHECKING:
    from markupsafe import Markup

WIDTH, GUTTER = 1000, 92
LANE, RUN, GAP, AXIS = 26, 22, 4, 20
MOST_ROWS, MOST_LANES = 2500, 64
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
SIGNS = {
    "died": "✕", "joined": "+", "scaled": "⇅", "resumed": "↻", "corrupt": "!", "ended": "■"
}  # fmt: skip


def timeline_chart(history: RunHistory) -> Markup | str:
    """The chart of a run; empty where its events do not tell what workers did."""
    from markupsafe import Markup

    lanes = sorted(enumerate(history.lanes.rows), key=lambda each: each[1])[:MOST_LANES]
    if not history.times.rows or not lanes or history.now <= 0:
        return ""
    places = {number: RUN + GAP + index * (LANE + GAP) for index, (number, _) in enumerate(lanes)}
    height = RUN + GAP + len(lanes) * (LANE + GAP) + AXIS
    several = len({host for host, _ in history.lanes.rows}) > 1
    parts = [
        *_names([lane for _, lane in lanes], several),
        *_times(history, places),
        *_states(history, places),
        *_bands(history, height),
        *_marks(history),
        *_axis(history.now, height),
    ]
    label = f"Timeline of {len(history.lanes.rows)} workers"
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return head.format(WIDTH, height, label) + Markup("").join(parts) + Markup("</svg>")


def _x(at: float, now: float) -> float:
    return round(GUTTER + (WIDTH - GUTTER) * min(max(at / now, 0.0), 1.0), 2)


def _rect(x: float, y: float, wide: float, high: float, what: str, title: str = "") -> Markup:
    from markupsafe import Markup

    told = Markup("<title>{}</title>").format(title) if title else Markup("")
    rect = Markup('<rect class="{}" x="{}" y="{}" width="{}" height="{}">{}</rect>')
    return rect.format(what, round(x, 2), round(y, 2), round(wide, 2), round(high, 2), told)


def _text(x: float, y: float, text: str, what: str, title: str = "") -> Markup:
    from markupsafe import Markup

    told = Markup("<title>{}</title>").format(title) if title else Markup("")
    return Markup('<text class="{}" x="{}" y="{}">{}{}</text>').format(what, x, y, text, told)


def _names(lanes: list[list[object]], several: bool) -> Iterator[Markup]:
    yield _text(0, RUN - 7, "run", "lane")
    yield _rect(GUTTER, 0, WIDTH - GUTTER, RUN, "ground")
    for index, (host, worker) in enumerate(lanes):
        y = RUN + GAP + index * (LANE + GAP)
        name = f"{worker} of {host}" if several else f"worker {worker}"
        yield _text(0, y + LANE - 8, name if len(name) < 15 else name[:14] + "…", "lane", name)
        yield _rect(GUTTER, y, WIDTH - GUTTER, LANE, "ground")


def _times(history: RunHistory, places: dict[int, int]) -> Iterator[Markup]:
    now = history.now
    for lane, begun, ended, spent in thin_times(history.times.rows, MOST_ROWS):
        if lane not in places:
            continue
        left, right = _x(begun, now), _x(ended, now)
        whole = max(ended - begun, sum(spent)) or 1.0
        bottom = float(places[lane] + LANE)
        for phase, seconds in zip(PHASES, spent, strict=True):
            high = seconds / whole * LANE
            if high >= 0.1:
                bottom -= high
                yield _rect(left, bottom, max(right - left, 0.6), high, phase)


def _states(history: RunHistory, places: dict[int, int]) -> Iterator[Markup]:
    open_at: dict[int, tuple[float, str]] = {}
    ends = [[lane, history.now, "end"] for lane in places]
    found = []
    for lane, at, state in [*history.states.rows, *ends]:
        begun, was = open_at.get(lane, (0.0, ""))
        if was in ("dead", "starting") and lane in places:
            left = _x(begun, history.now)
            wide = max(_x(at, history.now) - left, 3.0)
            found.append((was == "dead", _rect(left, places[lane], wide, LANE, was, was)))
        open_at[lane] = (at, state)
    # A death is drawn over the start of the one that takes its place, however short it was.
    yield from (rect for _, rect in sorted(found, key=lambda each: each[0]))


def _bands(history: RunHistory, height: int) -> Iterator[Markup]:
    for begun, until, kind, text in history.bands.rows:
        left = _x(begun, history.now)
        wide = max(_x(until, history.now) - left, 2.0)
        yield _rect(left, 3, wide, RUN - 6, kind, text)
        if kind == "recovering":
            yield _rect(left, RUN, wide, height - RUN - AXIS, "held", text)


def _marks(history: RunHistory) -> Iterator[Markup]:
    free = 0.0
    for at, _, kind, text in history.marks.rows:
        if kind in SIGNS:
            x = max(_x(at, history.now), free)  # those of one moment stand side by side
            free = x + 11
            yield _text(x, RUN - 7, SIGNS[kind], f"sign {kind}", text)


def _axis(now: float, height: int) -> Iterator[Markup]:
    step = next((each for each in STEPS if now / each <= 10), 604800.0)
    for index in range(1, int(now / step) + 1):
        at = index * step
        minutes, seconds = divmod(at, 60)
        hours, minutes = divmod(int(minutes), 60)
        clock = f"{hours}:{minutes:02}:{seconds:02.0f}" if hours else f"{minutes}:{seconds:02.0f}"
        yield _text(_x(at, now), height - 5, clock if step >= 1 else f"{at:.1f} s", "tick")
