"""Notebook display: a run's progress as one output of a cell, replaced while it goes on.

IPython is used where it runs already, and is never imported anew: nobody needs it for this.
"""

from __future__ import annotations

import contextlib
import html
import math
import sys
from collections.abc import Sequence
from typing import Any

from lockstep.results.charts import Curve

REDRAW_SECONDS = 0.25
LAST_LINES = 6
"""So many lines, of evaluations and recoveries, are shown."""
WIDTH, HEIGHT = 420, 90
"""Of the curve, in pixels."""


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    core: Any = sys.modules.get("IPython")
    shell = core.get_ipython() if core is not None and hasattr(core, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


class NotebookDisplay:
    """Display: the curve of the loss, the last state, and what happened, as HTML."""

    seconds = REDRAW_SECONDS

    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps = name, steps
        self._curve, self._lines = Curve(), list[str]()
        self._step, self._parts = 0, list[str]()
        self._handle: Any = None
        self._draw()

    def show(self, step: int, loss: float, parts: Sequence[str]) -> None:
        """Show the state of the run."""
        if math.isfinite(loss):
            self._curve.add(step, loss)
        self._step, self._parts = step, list(parts)
        self._draw()

    def line(self, text: str) -> None:
        """Show a line, among the last ones."""
        self._lines = [*self._lines, text][-LAST_LINES:]
        self._draw()

    def close(self) -> None:
        """The last state stays."""

    def _draw(self) -> None:
        """Replace the output. Nothing that goes wrong in the notebook concerns the run."""
        with contextlib.suppress(Exception):
            display: Any = sys.modules["IPython"].display
            content = display.HTML(self.html())
            if self._handle is None:
                self._handle = display.display(content, display_id=True)
            else:
                self._handle.update(content)

    def html(self) -> str:
        """The output: no scripts, and nothing of what a run says is markup."""
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self._lines)
        return (
            f"<div style='font-variant-numeric:tabular-nums'><b>{html.escape(self._name)}</b> "
            f"<progress max='{max(self._steps, 1)}' value='{self._step}'></progress> "
            f"{html.escape(' · '.join(self._parts))}<br>{self._svg()}"
            f"<ul style='margin:0'>{lines}</ul></div>"
        )

    def _svg(self) -> str:
        points = [(part.last, part.total / part.count) for part in self._curve.bins]
        if len(points) < 2:
            return ""
        low, high = min(y for _, y in points), max(y for _, y in points)
        first, last = points[0][0], points[-1][0]
        across, up = WIDTH / max(last - first, 1), (HEIGHT - 24) / ((high - low) or 1.0)
        path = " ".join(f"{(x - first) * across:.1f},{18 + (high - y) * up:.1f}" for x, y in points)
        return (
            f"<svg width='{WIDTH}' height='{HEIGHT}' role='img' aria-label='loss'>"
            f"<text y='11' font-size='11' fill='currentColor'>loss, {high:.4g} to {low:.4g}</text>"
            f"<polyline points='{path}' fill='none' stroke='#3b73b9' stroke-width='1.6'/></svg>"
        )
