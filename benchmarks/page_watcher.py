"""Page watcher: the page's server over a folder of runs, and clients that read a run's stream."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

LOOKS = 300
"""At whether a run has begun, ten in a second."""
TICKS = os.sysconf("SC_CLK_TCK")


class Watcher:
    """The page's server over a folder, and a client that reads a run's stream."""

    def __init__(self, runs: Path) -> None:
        runs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lockstep", "watch", str(runs)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        address = urlsplit(self.process.stdout.readline().split()[-1])
        self.started_after = 0.0
        """The processor time that it had taken when the stream began."""
        self.address, self.token = address.netloc, address.fragment.partition("=")[2]

    def get(self, path: str) -> http.client.HTTPResponse:
        """An answer of the server."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"})
        return connection.getresponse()

    def stream(self, name: str) -> http.client.HTTPResponse:
        """A run's stream, as soon as the run is there."""
        for _ in range(LOOKS):
            answer = self.get(f"/api/runs/{name}/stream")
            if answer.status == 200:
                return answer
            answer.close()
            time.sleep(0.1)
        raise TimeoutError(f"{name} has not begun within {LOOKS / 10:.0f} s")

    def follow(self, name: str, seen: list[tuple[float, dict[str, Any]]]) -> None:
        """Read a run's stream to its end, from when the run is there."""
        answer = self.stream(name)
        with contextlib.suppress(OSError, http.client.HTTPException):
            while line := answer.readline():
                seen.append((time.time(), json.loads(line)))

    @contextlib.contextmanager
    def client(self, name: str) -> Iterator[None]:
        """A process that reads a run's stream and does nothing with it."""
        self.stream(name).close()
        self.started_after = self.cpu_seconds()
        url = f"http://{self.address}/api/runs/{name}/stream"
        command = ["curl", "--silent", "--no-buffer", "--output", os.devnull, "--config", "-", url]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        assert process.stdin is not None
        try:
            with process.stdin as config:  # the token is on no command line
                config.write(f'header = "Authorization: Bearer {self.token}"\n')
            yield
        finally:
            process.kill()
            process.wait()

    def cpu_seconds(self) -> float:
        """The processor time that the server has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
