"""Progress: plain lines off a terminal, a bar on one, and never a failure of its own."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable

import pytest

from lockstep.results.progress import LINE_SECONDS, Progress


class Clock:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def update(progress: Progress, step: int, loss: float = 0.5) -> None:
    progress.update(step, loss, samples_per_second=41_234.0, workers=4, data_epoch=step // 10)


def test_plain_lines_are_few_and_hold_no_control_codes() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(True, 100, "digits", stream=stream, clock=clock) as progress:
        for step in range(1, 101):
            update(progress, step)
            clock.now += LINE_SECONDS / 10
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/100" for n in (*range(1, 100, 10), 100)]
    assert lines[1] == (
        "digits  11/100  loss 0.5  41.2k samples/s  0:44 left  4 workers  data epoch 1"
    )
    assert not [c for c in stream.getvalue() if unicodedata.category(c) == "Cc" and c != "\n"]


def test_evaluations_and_notes_are_always_printed() -> None:
    stream = io.StringIO()
    with Progress(True, 100, "digits", stream=stream, clock=Clock()) as progress:
        for step in range(1, 4):
            update(progress, step)
            progress.evaluated(step, {"accuracy": 0.91253, "loss": math.nan})
            progress.note(f"worker {step} joined")
        progress.evaluated(3, {})
    assert stream.getvalue().splitlines()[1:3] == [
        "digits  evaluated at step 1  accuracy 0.9125  loss nan",
        "digits  worker 1 joined",
    ]
    assert len(stream.getvalue().splitlines()) == 1 + 2 * 3 + 1 + 1


def test_the_time_left_of_a_resumed_run_counts_its_own_steps() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(True, 1000, "digits", stream=stream, clock=clock) as progress:
        update(progress, 900)
        clock.now += 100.0
        update(progress, 910)
    assert "15:00 left" in stream.getvalue()


def test_disabled_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(False, 10, "digits") as progress:
        update(progress, 1)
        progress.note("note")
        progress.evaluated(1, {"accuracy": 1.0})
    assert capfd.readouterr() == ("", "")


def test_stderr_is_the_default_and_stdout_stays_clean(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True, 10, "digits") as progress:
        update(progress, 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert "1/10" in err


def test_a_bar_on_a_terminal(terminal: Terminal) -> None:
    clock, stdout, stderr = Clock(), sys.stdout, sys.stderr
    threads = threading.active_count()
    with Progress(True, 100, "digits", stream=terminal, clock=clock) as progress:
        for step in range(1, 101):
            update(progress, step)
            assert threading.active_count() == threads, "the process forks: no threads"
            assert sys.stdout is stdout
        progress.evaluated(100, {"accuracy": 0.5})
        progress.note("worker 2 died [bold]in[/bold] update :smile:")
    shown = terminal.getvalue()
    assert "100/100" in shown
    assert "4 workers" in shown
    assert "\u2501" in shown
    assert "\n" in shown.partition("worker 2 died [bold]in[/bold] update :smile:")[2]
    assert "evaluated at step 100  accuracy 0.5" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l"), "the cursor is back"
    assert "50/100" not in shown, "redrawn only so often"
    assert sys.stderr is stderr


def test_a_narrow_terminal_cuts_what_matters_least(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    with Progress(True, 100, "a-job-with-a-long-name-indeed", stream=terminal) as progress:
        update(progress, 7)
    assert "7/100" in terminal.getvalue()
    assert "data epoch" not in terminal.getvalue()


@pytest.mark.parametrize("make", [io.StringIO, Terminal])
def test_hostile_strings(make: Callable[[], io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = make()
    with Progress(True, 10, "[red]x\x1b]0;owned\x07", stream=stream) as progress:
        update(progress, 1)
        progress.note("two\nlines \x1b[2J\x9b2J [/] \ud800 \u202e")
        progress.evaluated(1, {"[bold]\x1b[1m": 1.0})
    shown = stream.getvalue()
    assert "[red]x" in shown
    assert "two lines" in shown
    for forbidden in ("\x1b]0", "\x07", "\x1b[2J", "\x9b", "\ud800", "\u202e"):
        assert forbidden not in shown


def test_a_dumb_terminal_gets_plain_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Progress(True, 10, "digits", stream=terminal) as progress:
        update(progress, 1)
    assert terminal.getvalue().startswith("digits  1/10")
    assert "\x1b" not in terminal.getvalue()


def test_a_stream_of_few_characters() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Progress(True, 10, "дом", stream=stream) as progress:
        update(progress, 1)
    assert stream.buffer.seek(0) == 0
    assert stream.buffer.read().startswith(b"\\u0434\\u043e\\u043c  1/10")


@pytest.mark.parametrize("make", [io.StringIO, Terminal])
def test_a_broken_stream_does_not_stop_the_run(
    make: Callable[[], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = make()
    stderr = sys.stderr
    with Progress(True, 10, "digits", stream=stream) as progress:
        stream.close()
        for step in range(1, 11):
            update(progress, step)
        progress.note("still there")
    assert sys.stderr is stderr


def test_an_exception_passes_through(terminal: Terminal) -> None:
    with pytest.raises(KeyboardInterrupt), Progress(True, 10, "digits", stream=terminal):
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in terminal.getvalue()


def test_numbers_of_any_kind() -> None:
    stream = io.StringIO()
    with Progress(True, 0, "digits", stream=stream) as progress:
        progress.update(0, math.nan, math.inf, 1, 0)
    assert "0/0  loss nan  inf samples/s  1 worker  data epoch 0" in stream.getvalue()


def test_importing_needs_neither_rich_nor_torch() -> None:
    code = (
        "import sys, lockstep; before = set(sys.modules); import lockstep.results.progress;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "assert not new & {'rich', 'torch', 'numpy', 'pygal'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
