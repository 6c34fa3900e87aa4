"""Progress: a bar on a terminal, an output of a notebook's cell, otherwise a line every few seconds
on stderr.

There are no threads, since the process forks workers, and an error of the stream never stops the
run. Rich is imported only for a bar.
"""

from __future__ import annotations

import math
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self, TextIO

from lockstep.results.notebook_display import NotebookDisplay, in_notebook

REDRAW_SECONDS = 0.1
"""The bar is redrawn at most this often."""
LINE_SECONDS = 5.0
"""Plain lines are printed at most this often; evaluations and notes always."""
LONGEST_NAME, LEAST_BAR = 20, 10
"""Most columns of the name, and fewest of the bar."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Moment: the last committed step, and the run's speed."""

    step: int
    loss: float
    samples_per_second: float
    workers: int
    data_epoch: int | None


def announce(phase: str, *, quiet: bool) -> None:
    """Say what a command does before there is a run: loading, measuring, starting workers."""
    stream = sys.stderr
    if not quiet and stream is not None:
        with suppress(OSError, ValueError):
            _Plain(stream, "lockstep").line(_clean(phase))


class Display(Protocol):
    """Display: where progress is shown. Texts have no control characters."""

    seconds: float
    """The shortest time between two calls of `show`."""

    def show(self, step: int, loss: float, parts: Sequence[str]) -> None:
        """Show the state of the run; the most important parts come first."""

    def line(self, text: str) -> None:
        """Print a line that stays."""

    def close(self) -> None:
        """Leave the stream as it was found."""


class Progress:
    """Progress: a context manager, whose methods are called from one thread.

    `steps` is the run's last step, `name` the job's. `stream` (default: `sys.stderr` at entry)
    and `clock` are for tests. With `enabled` false nothing is ever printed.
    """

    def __init__(
        self,
        enabled: bool,
        steps: int,
        name: str,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enabled, self._steps, self._name = enabled, steps, _clean(name)
        self._stream, self._clock = stream, clock
        self._display: Display | None = None
        self._moment: Moment | None = None
        self._first: tuple[int, float] | None = None
        self._due = -math.inf
        self._stale = False

    def __enter__(self) -> Self:
        stream = self._stream or sys.stderr
        if self._enabled and stream is not None:
            self._guard(lambda: self._open(stream))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stale:
            self._show(self._clock())
        display = self._display
        if display is not None:
            self._guard(display.close)
        self._display = None

    def update(
        self,
        step: int,
        loss: float,
        samples_per_second: float,
        workers: int,
        data_epoch: int | None = None,
    ) -> None:
        """A step was committed. Cheap enough to call after every one."""
        if self._display is None:
            return
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        self._moment = Moment(step, loss, samples_per_second, workers, data_epoch)
        self._stale = True
        if now >= self._due:
            self._show(now)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print held-out metrics, on a line that stays."""
        values = "  ".join(f"{_clean(name)} {value:.4g}" for name, value in metrics.items())
        self._line(f"evaluated at step {step:,}  {values}".rstrip())

    def note(self, text: str) -> None:
        """Print a line that stays, above the bar if there is one."""
        self._line(_clean(text))

    def _open(self, stream: TextIO) -> None:
        if self._stream is None and in_notebook():
            self._display = NotebookDisplay(self._name, self._steps)
        elif _is_terminal(stream):
            self._display = _Bar(stream, self._name, self._steps)
        else:
            self._display = _Plain(stream, self._name)

    def _line(self, text: str) -> None:
        display = self._display
        if display is not None:
            self._guard(lambda: display.line(text))

    def _show(self, now: float) -> None:
        display, moment = self._display, self._moment
        if display is None or moment is None:
            return
        self._due, self._stale = now + display.seconds, False
        parts = _describe(moment, self._steps, self._seconds_left(moment.step, now))
        self._guard(lambda: display.show(moment.step, moment.loss, parts))

    def _seconds_left(self, step: int, now: float) -> float | None:
        """Estimated from this process's speed: a resumed run has made earlier steps before."""
        if self._first is None or step <= self._first[0] or step >= self._steps:
            return None
        return (now - self._first[1]) / (step - self._first[0]) * (self._steps - step)

    def _guard(self, action: Callable[[], None]) -> None:
        """Run `action`; a stream that is closed or broken ends the display, not the run."""
        try:
            action()
        except (OSError, ValueError):
            display, self._display = self._display, None
            if display is not None:
                with suppress(OSError, ValueError):
                    display.close()


class _Plain:
    """Lines without control codes, for logs and pipes."""

    seconds = LINE_SECONDS

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def show(self, step: int, loss: float, parts: Sequence[str]) -> None:
        self.line("  ".join(parts))

    def line(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        line = f"{self._name}  {text}\n".encode(encoding, "backslashreplace").decode(encoding)
        self._stream.write(line)
        self._stream.flush()

    def close(self) -> None:
        pass


class _Bar:
    """A bar of Rich, redrawn on `show` and never by a thread of its own."""

    seconds = REDRAW_SECONDS

    def __init__(self, stream: TextIO, name: str, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress
        from rich.table import Column

        self._rich = RichProgress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.fields[text]}", markup=False, table_column=Column(no_wrap=True)),
            console=Console(file=stream, force_terminal=True, highlight=False),
            auto_refresh=False,
            redirect_stdout=False,
            expand=True,
        )
        name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "\u2026"
        self._taken = len(name) + LEAST_BAR + 2
        self._task = self._rich.add_task(name, total=max(steps, 1), text=f"0/{steps:,}")
        self._rich.start()

    def show(self, step: int, loss: float, parts: Sequence[str]) -> None:
        text = _fit(parts, self._rich.console.width - self._taken)
        self._rich.update(self._task, completed=step, text=text, refresh=True)

    def line(self, text: str) -> None:
        self._rich.console.print(text, markup=False, emoji=False, highlight=False)

    def close(self) -> None:
        self._rich.stop()


def _is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that takes control codes."""
    try:
        return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb")
    except (OSError, ValueError):
        return False


def _describe(moment: Moment, steps: int, seconds_left: float | None) -> list[str]:
    """The texts that describe a moment, the most important first."""
    parts = [
        f"{moment.step:,}/{steps:,}",
        f"loss {moment.loss:.4g}",
        f"{_rate(moment.samples_per_second)} samples/s",
        f"{moment.workers} worker" + "s" * (moment.workers != 1),
    ]
    if moment.data_epoch is not None:
        parts.append(f"data epoch {moment.data_epoch}")
    if seconds_left is not None and math.isfinite(seconds_left):
        parts.insert(3, f"{_duration(seconds_left)} left")
    return parts


def _fit(parts: Sequence[str], width: int) -> str:
    """As many of `parts` as fit into `width` columns, and always the first."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + 2 + len(part) > width:
            break
        text += "  " + part
    return text


def _rate(value: float) -> str:
    """Samples per second in few characters: `87.5`, `4,120`, `41.2k`."""
    if not math.isfinite(value) or value < 100:
        return f"{value:.3g}"
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"


def _duration(seconds: float) -> str:
    """`1:05` or `2:01:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _clean(text: str) -> str:
    """`text` as one line without control, bidirectional or unpaired surrogate characters."""
    return "".join(
        " " if c in "\t\n" else "\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c
        for c in str(text)
    )
