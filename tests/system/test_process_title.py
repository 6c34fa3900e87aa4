"""What `ps` shows of a process, and that the environment behind it in memory stays readable."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import os, sys
from lockstep.system.process_title import set_title
assert "SPT_NOENV" not in os.environ
set_title("forkserver", "mnist")
set_title("worker 1")
print(open("/proc/self/cmdline", "rb").read().rstrip(b"\\0").decode())
print(b"MARK=here" in open("/proc/self/environ", "rb").read().split(b"\\0"))
"""


def test_the_title_takes_the_place_of_the_command_line_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, "x" * 100],
        env={**os.environ, "MARK": "here"}, capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    title, marked = done.stdout.splitlines()
    assert title.rstrip() == "lockstep worker 1 of mnist"
    assert marked == "True"
