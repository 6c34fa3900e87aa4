"""Several hosts on this machine: agents in processes of their own, talking over loopback."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from benchmarks.namespaces import Network
from lockstep.agent.job_offer import JobOffer
from lockstep.net.transport import Report, ignore
from lockstep.system.messages import encode
from tests.support.tls_hosts import Cluster
from tests.zoo.samples import Noisy
from tests.zoo.vectors import CLASSES, FEATURES, HELD_OUT, SAMPLES, Vectors, normal, whole

AGENT = """
# the numerics of a host come from its environment, which the forkserver inherits
import os
import sys
from pathlib import Path
from typing import Any
from lockstep.agent.agent import serve
from lockstep.errors import LockstepError
from lockstep.net.identity import Identity
from benchmarks.namespaces import Network
from lockstep.agent.job_offer import OFFER
offer = OFFER.decode(sys.stdin.buffer.read())
exec(os.environ.get("LOCKSTEP_TEST_HARM", ""))
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


class OnlyHere(Vectors):
    """A task whose data sets are on the master's host alone: tensors, as many as it takes."""

    def __init__(self, fill: int = 0) -> None:
        self.fill = fill

    def train_data(self) -> Dataset[Any]:
        need_the_master()
        inputs, labels = normal(SAMPLES, FEATURES), whole(CLASSES, SAMPLES)
        return TensorDataset(inputs, labels, torch.zeros(SAMPLES, self.fill))

    def eval_data(self) -> Dataset[Any] | None:
        need_the_master()
        return super().eval_data()


class Described(OnlyHere):
    """The same of samples that are fetched one by one, or several at once; batches are drawn."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def train_data(self) -> Dataset[Any]:
        x, y, _ = super().train_data().tensors  # type: ignore[attr-defined]
        samples = [({"x": x[n].numpy(), "name": str(n)}, int(y[n])) for n in range(SAMPLES)]
        return (
            Subset(Listed(samples), range(SAMPLES)) if self.kind == "several" else Listed(samples)
        )

    def collate(self, samples: list[Any]) -> Any:
        if not isinstance(samples[0][0], dict):
            return default_collate(samples)
        described, labels = default_collate(samples)
        inputs = described["x"]
        return inputs + random.random() * torch.randn(inputs.shape), labels


KEPT = {"": (0, 50), "b": (50, 62), "c": (62, SAMPLES)}
HELD = {"": (0, 0), "b": (0, 12), "c": (12, HELD_OUT)}
"""What each host has of the samples of `Kept`."""


class Kept(Vectors):
    """A task whose data is in parts, one on each host; or whole."""

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole

    def train_data(self) -> Dataset[Any]:
        return self._mine(TensorDataset(normal(SAMPLES, FEATURES), whole(CLASSES, SAMPLES)), KEPT)

    def eval_data(self) -> Dataset[Any] | None:
        held_out = super().eval_data()
        assert isinstance(held_out, TensorDataset)
        found = self._mine(held_out, HELD)
        return found if len(found) else None

    def _mine(self, dataset: TensorDataset, parts: Mapping[str, tuple[int, int]]) -> TensorDataset:
        if self.whole:
            return dataset
        first, last = parts[os.environ.get("LOCKSTEP_TEST_HOST", "")]
        return TensorDataset(*(tensor[first:last] for tensor in dataset.tensors))


class Drawn(OnlyHere):
    """The samples themselves are drawn."""

    def train_data(self) -> Dataset[Any]:
        return Noisy(SAMPLES, seed=1)


class Changed(OnlyHere):
    """Building the data changes the task."""

    def train_data(self) -> Dataset[Any]:
        self.fill = 1
        self.mean = 2.0
        return super().train_data()


class Listed(Dataset[Any]):
    """The samples of a list."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


class Answers(Vectors):
    """Predicts; each host leaves its name in a folder. One whose end is wanted there is killed, as
    a whole, when it has answered once; while one is awaited that has not answered, all are slow.

    Some answers are longer than a message may be.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def fitted(self) -> str:
        path = self.folder / f"fitted-{os.environ.get('LOCKSTEP_TEST_HOST', 'master')}"
        return path.read_text() if path.exists() else ""

    def from_record(self, record: Mapping[str, Any]) -> torch.Tensor:
        return torch.tensor(record["point"])

    def predict(self, model: torch.nn.Module, batch: torch.Tensor) -> list[dict[str, Any]]:
        host = os.environ.get("LOCKSTEP_TEST_HOST", "master")
        if (self.folder / f"end-{host}").exists() and (self.folder / host).exists():
            os.kill(_parent_of(os.getppid()), signal.SIGKILL)  # the agent; its children follow
        (self.folder / host).touch()
        awaited = [path.name.removeprefix("await-") for path in self.folder.glob("await-*")]
        if not all((self.folder / name).exists() for name in awaited):
            time.sleep(0.05)
        drawn = torch.rand(len(batch)).tolist()
        return [
            {"scores": scores, "drawn": value, "long": 'é"' * 60_000 * (scores[0] > 1.5)}
            for scores, value in zip(model(batch).tolist(), drawn, strict=True)
        ]


def _parent_of(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("PPid")).split()[1])


def need_the_master() -> None:
    """Raise on every other host."""
    host = os.environ.get("LOCKSTEP_TEST_HOST")
    if host:
        raise RuntimeError(f"host {host} has no data")


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
        self._offer: JobOffer | None = None

    def offer(self, offer: JobOffer) -> tuple[str, ...]:
        self._offer = offer
        for name, workers in self.names.items():
            self.start(name, workers)
        return tuple(self.names)

    @property
    def offered(self) -> JobOffer:
        """The job. Asked once it is offered."""
        assert self._offer is not None
        return self._offer

    def start(self, name: str, workers: int, environment: Mapping[str, str] | None = None) -> None:
        """Start one host's agent."""
        identity = self.cluster.identity(name)
        shutil.rmtree(self.code(name), ignore_errors=True)  # an earlier agent's
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
            pipe.write(encode(self.offered))
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
