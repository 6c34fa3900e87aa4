"""Several hosts on this machine: agents in processes of their own, talking over loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lockstep.net.transport import Report, ignore
from lockstep.offer import Offer
from tests.hosts import Cluster

AGENT = """
import json, sys
from pathlib import Path
from lockstep.agent import serve
from lockstep.errors import LockstepError
from lockstep.net.identity import Identity
from lockstep.offer import Offer
from lockstep.processes import die_with_parent
die_with_parent(int(sys.argv[3]))
offer = Offer.from_message(json.load(sys.stdin))
report = lambda who, why: print(f"{who}: {why}", file=sys.stderr)
try:
    serve(Identity.load(Path(sys.argv[1])), offer, workers=int(sys.argv[2]), host="127.0.0.1",
          report=report)
except LockstepError as error:
    sys.exit(f"agent: {error}")
"""


class Agents:
    """A launcher that starts an agent for each host of a job, as this machine's processes."""

    def __init__(self, cluster: Cluster, workers: Mapping[str, int], here: int = 1) -> None:
        self.cluster, self.names = cluster, dict(workers)
        self.identity = cluster.identity("master")
        self.host = "127.0.0.1"
        self.workers: int | None = here
        self.report: Report = ignore
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._offer: Offer | None = None

    def offer(self, offer: Offer) -> tuple[str, ...]:
        self._offer = offer
        for name, workers in self.names.items():
            self.start(name, workers)
        return tuple(self.names)

    def start(self, name: str, workers: int) -> None:
        """Start one host's agent."""
        assert self._offer is not None
        identity = self.cluster.identity(name)
        with Path(self.cluster.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", AGENT, identity.folder, str(workers), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(json.dumps(self._offer.to_message()).encode())
        self.processes[name] = process

    def signal(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to a host's agent; with SIGKILL all of its processes die."""
        self.processes[name].send_signal(number)

    def log(self, name: str) -> str:
        """What a host's agent has written."""
        return (self.cluster.folder / f"{name}.log").read_text()

    def close(self) -> None:
        pass

    def wait(self, seconds: float = 20.0) -> dict[str, int]:
        """Wait for all agents to end; their exit codes."""
        codes = {}
        for name, process in self.processes.items():
            try:
                codes[name] = process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes[name] = 999
        return codes
