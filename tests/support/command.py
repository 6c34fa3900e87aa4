"""The `lockstep` command as users have it: a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIMIT_SECONDS = 120
TASKS = Path(__file__).with_name("named_tasks.py")
"""The file of the tasks that tests name on the command line."""


def python(*arguments: str, cwd: Path, script: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, and `script` on its standard input."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        input=script,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


def lockstep(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a `lockstep` command to its end."""
    return python("-m", "lockstep", *arguments, cwd=cwd)
