"""Shared model: hosts with a limit of their memory train a model that takes half as much again.

    python -m benchmarks.shared_model --layers 24

Two hosts are network namespaces, each with a control group. The limit is two thirds of what a plain
loop keeps of the model: parameters, gradients and Adam's two moments. The plain loop is killed
there, and Lockstep on one host refuses the job; two hosts with `ownership: slices` train and
evaluate it, to the fingerprint of one host that has no limit. Needs root, iproute2 and the control
groups of memory (version 1 or 2).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import lockstep
from benchmarks import namespaces
from benchmarks.namespaces import Network
from tests.support.agents_on_loopback import Agents
from tests.support.tls_hosts import Cluster

WIDTH, BATCH, STEPS, SLICES = 4096, 8, 3, 2
LIMIT = 900.0
GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.peak"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
)


class Wide(lockstep.Task):
    """Layers of 4096 x 4096."""

    def __init__(self, layers: int = 24) -> None:
        self.layers = layers

    def model(self) -> nn.Module:
        made: list[nn.Module] = []
        for _ in range(self.layers):
            made += [nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU()]
        return nn.Sequential(*made)

    def train_data(self) -> Dataset[Any]:
        x = torch.randn(BATCH * STEPS, WIDTH, generator=torch.Generator().manual_seed(1))
        return TensorDataset(x, x.roll(1, 1))

    def eval_data(self) -> Dataset[Any]:
        return self.train_data()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        found: torch.Tensor = (model(batch[0]) - batch[1]).square().mean()
        return found

    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=1e-4)


class Group:
    """A control group with a limit of memory."""

    def __init__(self, name: str, limit: int) -> None:
        root, limited, self._most = next(each for each in GROUPS if _usable(*each))
        self.folder = root / name
        self.folder.mkdir()
        (self.folder / limited).write_text(str(limit))

    @property
    def enter(self) -> list[str]:
        """What a command is put behind, to run in it."""
        return ["sh", "-c", f'echo $$ > {self.folder}/cgroup.procs && exec "$@"', "sh"]

    def most_bytes(self) -> int:
        """The most that was used at a time, with pages of files."""
        return int((self.folder / self._most).read_text())

    def remove(self) -> None:
        """Remove it, when its last process is gone."""
        for _ in range(100):
            with contextlib.suppress(OSError):
                return self.folder.rmdir()
            time.sleep(0.1)
        raise TimeoutError(f"{self.folder} has processes still")


def _usable(root: Path, limited: str, most: str) -> bool:
    return (root / "cgroup.procs").exists() and any(
        (folder / limited).exists() for folder in (root, *root.glob("*/"))
    )


@contextlib.contextmanager
def groups(count: int, limit: int) -> Iterator[list[Group]]:
    """Control groups, which are gone afterwards."""
    made = [Group(f"lockstep-{os.getpid()}-{number}", limit) for number in range(count)]
    try:
        yield made
    finally:
        for each in made:
            each.remove()


class LimitedAgents(Agents):
    """Agents of which each is in a control group."""

    entering: list[str]

    def _enter(self, name: str) -> list[str]:
        return [*self.entering, *super()._enter(name)]


def plain(layers: int) -> None:
    """A plain loop."""
    torch.set_num_threads(1)
    task = Wide(layers)
    model = task.model()
    optimizer = task.optimizer(lockstep.Parameters(list(model.named_parameters())))
    x, y = task.train_data()[:BATCH]
    for _ in range(STEPS):
        optimizer.zero_grad()
        task.loss(model, (x, y)).backward()
        optimizer.step()
    print(json.dumps({"trained": True}))


def job(layers: int, hosts: int, network: str, folder: str, entering: str) -> None:
    """The master of a run on so many hosts."""
    agents = None
    if hosts > 1:
        agents = LimitedAgents(
            Cluster(Path(folder)), {f"host-{n}": 1 for n in range(1, hosts)}, 1,
            Network(hosts, network),
        )  # fmt: skip
        agents.entering = json.loads(entering)
    result = lockstep.run(
        "benchmarks.shared_model:Wide", args={"layers": layers}, on=agents, steps=STEPS,
        batch_size=BATCH, shards=1, threads=1, slices=SLICES, purity=0.0,
        ownership="slices" if hosts > 1 else "replicated", workers=hosts,
        out=f"{folder}/run-{hosts}", quiet=True,
    )  # fmt: skip
    if agents is not None:
        agents.wait(60.0)
    print(json.dumps({"fingerprint": result.fingerprint, "metrics": result.metrics}))


def started(command: list[str], *options: str) -> tuple[int, str]:
    """How a process of this file ends, and the last line of what it says."""
    whole = [*command, sys.executable, "-m", "benchmarks.shared_model", *options]
    ended = subprocess.run(
        whole, capture_output=True, text=True, timeout=LIMIT,
        env={**os.environ, "PYTHONPATH": f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}"},
    )  # fmt: skip
    said = (ended.stdout if ended.returncode == 0 else ended.stderr).strip()
    return ended.returncode, said


def compare(layers: int) -> None:
    """The ways, one after the other."""
    kept = 4 * layers * WIDTH * WIDTH * 4
    limit = kept * 2 // 3
    print(f"a plain loop keeps {kept / 2**20:,.0f} MiB, the limit is {limit / 2**20:,.0f} MiB")
    size = ("--layers", str(layers))
    with groups(1, limit) as (group,):
        code, _ = started(group.enter, "plain", *size)
        print(f"a plain loop under the limit: exit code {code}", flush=True)
    with groups(1, limit) as (group,), tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        code, said = started(group.enter, "job", *size, "--hosts", "1", "--folder", folder)
        print(f"Lockstep on one host under the limit: exit code {code}\n{said[-700:]}", flush=True)
    with (
        groups(2, limit) as (own, other),
        tempfile.TemporaryDirectory(dir="/var/tmp") as folder,
        Network(2) as network,
    ):
        code, said = started(
            # `ip netns exec` would hide the control groups, which the other host's agent enters.
            [*own.enter, "nsenter", f"--net=/run/netns/{network.name}-0"],
            "job", *size, "--hosts", "2", "--network", network.name, "--folder", folder,
            "--entering", json.dumps(other.enter),
        )  # fmt: skip
        print(f"Lockstep on two such hosts: exit code {code}\n{said[-2000:]}")
        for name, group in (("master", own), ("other", other)):
            print(f"{name}: at most {group.most_bytes() / 2**20:,.0f} MiB, with pages of files")
        for log in Path(folder).glob("*.log"):
            print(log.read_text()[-2000:])
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        code, said = started([], "job", *size, "--hosts", "1", "--folder", folder)
        print(f"Lockstep on one host without a limit: exit code {code}\n{said[-700:]}")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", default="compare", choices=["compare", "plain", "job"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--network", default="")
    parser.add_argument("--folder", default="")
    parser.add_argument("--entering", default="[]")
    options = parser.parse_args()
    if options.what == "plain":
        plain(options.layers)
    elif options.what == "job":
        job(options.layers, options.hosts, options.network, options.folder, options.entering)
    elif missing := namespaces.missing():
        print(missing, file=sys.stderr)
        return 1
    else:
        compare(options.layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
