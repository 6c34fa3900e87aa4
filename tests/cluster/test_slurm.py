"""Ranks that SLURM has started: a real controller and real nodes, all on this machine.

Where SLURM is not installed the tests are skipped, and say so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.net.shared_secret import make_secret
from tests.support import slurm_cluster as slurm_nodes
from tests.support.harmed_runs import Yard, await_event, events, yard
from tests.support.paced_task import PACE
from tests.support.slurm_cluster import LIMIT, SlurmNodes

__all__ = ["yard"]  # a fixture

MISSING = slurm_nodes.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no SLURM: {MISSING}")

TASK = "tests.support.paced_task:Paced"
SETTINGS: dict[str, Any] = {"batch_size": 24, "shards": 3, "threads": 1, "seed": 5, "steps": 40}
HERE = {"MASTER_ADDR": "127.0.0.1"}
"""No name server knows these nodes."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[SlurmNodes]:
    made = SlurmNodes(3)
    yield made
    made.close()


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(nodes: SlurmNodes, tmp_path: Path) -> Iterator[Start]:
    """Starts the job on so many nodes, with its run in `tmp_path / "run"`."""
    (tmp_path / "job.yaml").write_text(json.dumps({"task": TASK, **SETTINGS}))
    make_secret(tmp_path / "shared")
    started: list[subprocess.Popen[str]] = []

    def begin(
        *arguments: str, environment: dict[str, str] = HERE, pace: float = 0.0
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lockstep", "rank", "--secret", "shared",
                   "-w", "1", "--out", "run", "job.yaml"]  # fmt: skip
        started.append(
            nodes.srun([*arguments, *command], tmp_path, {**environment, PACE: str(pace)})
        )
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def on(nodes: int) -> tuple[str, ...]:
    return ("-N", str(nodes), "--ntasks-per-node=1")


def await_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    def check_alive() -> None:
        if process.poll() is not None:
            raise AssertionError(f"srun has ended: {process.communicate()}")

    await_event(
        run,
        lambda e: e["event"] == "evaluated" and e["step"] >= step,
        LIMIT,
        f"step {step}",
        check_alive,
    )


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.long)])
def test_the_same_bits_on_nodes(
    count: int, nodes: SlurmNodes, start: Start, yard: Yard, tmp_path: Path
) -> None:
    process = start(*on(count))
    out, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, errors
    wanted = yard.undisturbed(TASK, **SETTINGS)
    assert json.loads(out)["fingerprint"] == wanted.fingerprint
    hosts = [event["hosts"] for event in events(tmp_path / "run", "hosts")]
    assert hosts[-1] == [f"rank-{rank}" for rank in range(count)]
    nodes.await_rest()
    assert nodes.files() == []


def test_a_rank_is_killed(nodes: SlurmNodes, start: Start, yard: Yard, tmp_path: Path) -> None:
    """The others go on, and SLURM says at the end that there was one."""
    process = start(*on(2), pace=0.02)
    await_step(process, tmp_path / "run", 8)
    os.kill(nodes.ranks()[1], signal.SIGKILL)
    out, errors = process.communicate(timeout=LIMIT)
    assert json.loads(out)["fingerprint"] == yard.undisturbed(TASK, **SETTINGS).fingerprint
    assert [event["host"] for event in events(tmp_path / "run", "host_lost")] == ["rank-1"]
    assert process.returncode == 128 + signal.SIGKILL, errors
    assert "node2: task 1: Killed" in errors
    nodes.await_rest()


@pytest.mark.long
def test_rank_0_is_killed(nodes: SlurmNodes, start: Start, tmp_path: Path) -> None:
    process = start(*on(2), pace=0.02)
    await_step(process, tmp_path / "run", 8)
    os.kill(nodes.ranks()[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signal.SIGKILL, errors
    assert "node1: task 0: Killed" in errors
    nodes.await_rest()
