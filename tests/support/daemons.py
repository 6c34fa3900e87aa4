"""Commands that stay in the foreground, as processes of their own that tests talk to and end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 200.0
"""Seconds: for waits that end by themselves, on a machine that does other things as well."""


class Daemon:
    """A `lockstep` command, or another module, and what it says on stderr."""

    def __init__(
        self,
        *arguments: str | Path,
        cwd: Path,
        module: str = "lockstep",
        said: str = "",
        environment: dict[str, str] | None = None,
    ) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may be run under nohup
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *map(str, arguments)],
                cwd=cwd,
                env={**os.environ, **(environment or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        finally:
            signal.signal(signal.SIGHUP, before)
        assert self.process.stdin is not None
        with self.process.stdin as stdin:
            stdin.write(said.encode())
        self.process.stdin = None
        self.log = ""
        """What has been read of its stderr."""
        self._unread = ""

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.end(signal.SIGKILL)

    def until(self, text: str) -> str:
        """Go on reading its stderr up to a line with this text; returns the line."""
        assert self.process.stderr is not None
        limit, descriptor = time.monotonic() + LIMIT, self.process.stderr.fileno()
        while True:
            line, end, rest = self._unread.partition("\n")
            if end:
                self._unread = rest
                if text in line:
                    return line
                continue
            ready, _, _ = select.select([descriptor], [], [], max(0.0, limit - time.monotonic()))
            data = os.read(descriptor, 65536).decode() if ready else ""
            if not data:
                raise AssertionError(f"no {text!r} in what it said:\n{self.log}")
            self.log, self._unread = self.log + data, self._unread + data

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal; returns its exit code, once it has ended."""
        self.process.send_signal(number)
        return self.wait()[0]

    def wait(self) -> tuple[int, str]:
        """Its exit code and its stdout, once it has ended."""
        try:
            out, error = self.process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise
        self.log += error.decode()
        return self.process.returncode, out.decode()
