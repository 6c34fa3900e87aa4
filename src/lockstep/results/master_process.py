"""Master process: what the events say of the process that leads a run, and whether it lives."""

from __future__ import annotations

import math
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from lockstep.errors import LockstepError, StoppedError
from lockstep.planning.memory_layout import Layout
from lockstep.results.event_schema import STREAM, Began
from lockstep.system.processes import start_time

MOST_WORDS, LONGEST_WORD = 200, 400
"""Longer command lines are cut."""


def describe_master(layout: Layout) -> dict[str, Any]:
    """The fields of the event `began`, of this process."""
    return {
        "stream": STREAM,
        "host": platform.node(),
        "pid": os.getpid(),
        "started": start_time(os.getpid()),
        "command": command_line(),
        "parameters": count_parameters(layout),
    }


def describe_end(error: BaseException) -> dict[str, str]:
    """The fields of the event `ended` but for its step."""
    why = error.what if isinstance(error, LockstepError) else type(error).__name__
    lines = why.splitlines() or [""]
    how = "stopped" if isinstance(error, StoppedError | KeyboardInterrupt) else "failed"
    return {"how": how, "why": lines[0][:LONGEST_WORD]}


def count_parameters(layout: Layout) -> int:
    """How many numbers the trainable parameters are."""
    return sum(math.prod(layout.entry(name).shape) for name in layout.trainable)


def command_line() -> list[str]:
    """The command line of this process, its program without the folder."""
    words = [word[:LONGEST_WORD] for word in sys.argv[:MOST_WORDS]]
    program = Path(words[0]) if words else Path()
    name = program.parent.name if program.name == "__main__.py" else program.name
    return [name or "python", *words[1:]]


def shown_command(command: list[str]) -> str:
    """A command line as it is typed."""
    return shlex.join(command)


def lives(began: Began) -> bool | None:
    """Whether the process that this tells of lives still; None: it is, or was, on another machine,
    and cannot be seen from here."""
    if began.host not in (None, platform.node()):
        return None
    return began.started != 0 and start_time(began.pid) == began.started
