"""Several hosts on this machine: agents in processes of their own, talking over loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, TensorDataset

from benchmarks.namespaces import Network
from lockstep.net.transport import Report, ignore
from lockstep.offer import Offer
from tests.hosts import Cluster
from tests.zoo import CLASSES, FEATURES, SAMPLES, Vectors, normal, whole

AGENT = """
# the numerics of a host come from its environment, which the nursery inherits
import json, sys
from pathlib import Path
from typing import Any
from lockstep.agent import serve
from lockstep.errors import LockstepError
from lockstep.net.identity import Identity
from benchmarks.namespaces import Network
from lockstep.offer import Offer
offer = Offer.from_message(json.load(sys.stdin))
report = lambda who, why: print(f"{who}: {why}", file=sys.stderr)
try:
    serve(Identity.load(Path(sys.argv[1])), offer, workers=int(sys.argv[2]), host=sys.argv[3],
          report=report, folder=Path(sys.argv[4]))
except LockstepError as error:
    sys.exit(f"agent: {error}")
"""


class Differs(Vectors):
    """A task whose data set is another one on each host."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def train_data(self) -> Dataset[Any]:
        host = os.environ.get("LOCKSTEP_TEST_HOST", "")
        return TensorDataset(normal(SAMPLES, FEATURES, seed=len(host)), whole(CLASSES, SAMPLES))


class Agents:
    """A launcher that starts an agent for each host of a job, as this machine's processes."""

    def __init__(
        self,
        cluster: Cluster,
        workers: Mapping[str, int],
        here: int = 1,
        network: Network | None = None,
    ) -> None:
        """With `network`, the hosts are its namespaces in this order, the master's the first."""
        self.cluster, self.names, self.network = cluster, dict(workers), network
        self.identity = cluster.identity("master")
        self.host = "127.0.0.1" if network is None else network.address(0)
        self.workers: int | None = here
        self.report: Report = ignore
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._offer: Offer | None = None

    def offer(self, offer: Offer) -> tuple[str, ...]:
        self._offer = offer
        for name, workers in self.names.items():
            self.start(name, workers)
        return tuple(self.names)

    def start(self, name: str, workers: int, environment: Mapping[str, str] | None = None) -> None:
        """Start one host's agent."""
        assert self._offer is not None
        identity = self.cluster.identity(name)
        self.code(name).mkdir(mode=0o700)
        with Path(self.cluster.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [
                    *self._enter(name),
                    sys.executable,
                    "-c",
                    AGENT,
                    str(identity.folder),
                    str(workers),
                    self._address(name),
                    str(self.code(name)),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "LOCKSTEP_TEST_HOST": name, **(environment or {})},
            )
        assert process.stdin is not None
        with process.stdin as pipe:
            pipe.write(json.dumps(self._offer.to_message()).encode())
        self.processes[name] = process

    def code(self, name: str) -> Path:
        """Where a host puts code that the master sends."""
        return self.cluster.folder / f"{name}.code"

    def _enter(self, name: str) -> list[str]:
        return [] if self.network is None else self.network.within(self._place(name), [])

    def _address(self, name: str) -> str:
        return self.host if self.network is None else self.network.address(self._place(name))

    def _place(self, name: str) -> int:
        return 1 + list(self.names).index(name)

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
