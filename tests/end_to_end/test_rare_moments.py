"""Moments that a random fault hits once in a thousand runs, each brought about on purpose."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import lockstep
from benchmarks.harm import live_workers, loaders_of
from lockstep.agent.failure_log import LOST_LOADERS
from lockstep.agent.local_host import WorkerHandle
from lockstep.agent.recovery import POISON_DEATHS
from lockstep.errors import PoisonError, StoppedError, WorkerLostError
from lockstep.job.faults import Fault
from lockstep.job.task import Parameters
from lockstep.planning.blocks import cut_blocks, own_blocks
from lockstep.planning.worker_messages import to_worker
from lockstep.system.processes import parent_of
from lockstep.system.unix_channel import Channel
from tests.support.harmed_runs import Yard, events, until, yard
from tests.zoo import ZOO
from tests.zoo.vectors import CLASSES, FEATURES, Vectors

__all__ = ["yard"]  # a fixture

WAIT = 20.0
"""Seconds: the longest that a test waits for an event."""


# Runs in the background.


@pytest.fixture
def endless() -> Iterator[Callable[..., lockstep.Run]]:
    """Starts runs that end when the test does."""
    started: list[lockstep.Run] = []

    def start(**settings: Any) -> lockstep.Run:
        task = settings.pop("task", Vectors())
        settings = {"threads": 1, "steps": 10**6, "batch_size": 26, "evaluate": False, **settings}
        started.append(lockstep.start(task, quiet=True, **settings))
        first = Path(settings["out"], "events.jsonl")
        until(lambda: first.exists() and events(settings["out"], "first_step"), WAIT, "a step")
        return started[-1]

    yield start
    for run in started:
        run.stop()
        with pytest.raises(StoppedError):
            run.result(WAIT)


Start = Callable[..., lockstep.Run]


# The audit.


class OneBlock(Vectors):
    """One block and batch statistics: of three workers only the second owns anything."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, CLASSES, bias=False), nn.BatchNorm1d(CLASSES, affine=False)
        )


def test_an_audit_after_the_buffers_were_combined(yard: Yard) -> None:
    """Rank 0, which owns no block, has combined the buffers when the only owner goes away: shards
    that were computed again from them would not give the bytes that they gave before."""
    blocks = cut_blocks([FEATURES * CLASSES], [True])
    assert [len(part) for part in own_blocks(blocks, 3)] == [0, 1, 0]
    stop = Fault(worker_id=1, step=2, phase="update_begin", kind="stop")
    settings: dict[str, Any] = {"steps": 4, "batch_size": 26, "audit": 1.0, "stall_seconds": 0.5}
    result = yard.check(OneBlock(), faults=(stop,), **settings)
    (died,) = events(result.folder, "died")
    assert died["step"] == 2
    assert result.recoveries[0]["steps_back"] >= 0
    assert events(result.folder, "corrupt") == []


# Hanging where there is no step to be late for.

SMALL: dict[str, Any] = {"steps": 8, "batch_size": 26}


@pytest.mark.parametrize("phase", ["start", "join"])
def test_stopped_before_the_first_step(phase: str, yard: Yard) -> None:
    """All wait for a worker that is stopped before it has said a word, or done anything."""
    stop = Fault(worker_id=1, step=0, phase=phase, kind="stop")
    result = yard.check(Vectors(), faults=(stop,), **SMALL)
    (stalled,) = events(result.folder, "stalled")
    assert stalled["worker"] == 1
    assert stalled["state"].startswith("T")
    assert stalled["host"] == platform.node()
    assert stalled["phase"] == {"start": "starting", "join": "compute"}[phase]


def test_endless_in_an_evaluation(yard: Yard) -> None:
    loop = Fault(worker_id=2, step=5, phase="evaluate", kind="loop")
    result = yard.check(Vectors(), faults=(loop,), stall_seconds=0.5, **SMALL)
    (stalled,) = events(result.folder, "stalled")
    assert (stalled["worker"], stalled["step"], stalled["phase"]) == (2, 5, "evaluate")
    assert "in _strike" in stalled["stack"]
    (died,) = events(result.folder, "died")
    assert died["phase"] == "evaluate"


FREEZER = Path("/sys/fs/cgroup/freezer")


@pytest.fixture
def freezer() -> Iterator[Path]:
    """A group of processes that can be frozen so that SIGKILL waits, as for a disk that hangs."""
    group = FREEZER / f"lockstep-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no freezer of control groups: {error}")
    yield group
    (group / "freezer.state").write_text("THAWED")
    until(lambda: not (group / "tasks").read_text(), WAIT, "the killed process to end")
    group.rmdir()


def test_a_worker_that_cannot_be_killed(
    freezer: Path, endless: Start, run_folders: Callable[[], str]
) -> None:
    """It is replaced all the same, and nobody waits for it at the end."""
    folder, settings = run_folders(), {"shards": 2, "workers": 2, "stall_seconds": 0.5}
    run = endless(out=folder, **settings)
    pid = next(event["pid"] for event in events(folder, "joined") if event["worker"] == 1)
    (freezer / "tasks").write_text(str(pid))
    (freezer / "freezer.state").write_text("FROZEN")
    until(lambda: events(folder, "recovered"), WAIT, "the others to go on")
    (died,) = events(folder, "died")
    assert (died["pid"], "hangs in the kernel" in died["how"]) == (pid, True)
    run.stop()
    begun = time.monotonic()
    with pytest.raises(StoppedError):
        run.result(WAIT)
    assert time.monotonic() - begun < 10
    assert (freezer / "tasks").read_text().split() == [str(pid)]


def test_forks_that_fail(endless: Start, run_folders: Callable[[], str]) -> None:
    """The others go on without the worker, which is forked as soon as that is possible again."""
    folder = run_folders()
    run = endless(out=folder, shards=2, workers=2)
    joined = events(folder, "joined")
    forkserver = parent_of(joined[0]["pid"])
    soft, hard = resource.prlimit(forkserver, resource.RLIMIT_NOFILE)
    resource.prlimit(forkserver, resource.RLIMIT_NOFILE, (5, hard))
    os.kill(joined[0]["pid"], signal.SIGKILL)
    until(lambda: events(folder, "fork_failed"), WAIT, "a fork that fails")
    until(lambda: events(folder, "recovered"), WAIT, "the others to go on")
    assert "Too many open files" in events(folder, "fork_failed")[0]["why"]
    resource.prlimit(forkserver, resource.RLIMIT_NOFILE, (soft, hard))
    until(lambda: len(events(folder, "joined")) == 3, WAIT, "the worker to be replaced")
    run.stop()
    with pytest.raises(StoppedError):
        run.result(WAIT)


def test_a_worker_has_died_before_it_is_killed() -> None:
    """It was found to be silent just before its death was heard of."""
    ours, theirs = Channel.pair()
    with subprocess.Popen(["true"]) as process:
        pidfd = os.pidfd_open(process.pid)
    stack = os.memfd_create("stack")
    worker = WorkerHandle(
        worker_id=0, pid=process.pid, channel=to_worker(ours), pidfd=pidfd, stack_fd=stack
    )
    assert worker.python_stack() == ""
    worker.kill()
    worker.close()
    theirs.close()


# Loader processes.


def test_a_loader_process_is_killed(endless: Start, run_folder: str) -> None:
    """Its worker is replaced. After a few times workers load for themselves."""
    run = endless(task=ZOO["augmented"].task, workers=2, shards=4, loaders=1, out=run_folder)
    until(lambda: lost_enough(run_folder), WAIT, "losses")
    until(lambda: events(run_folder, "recovered"), WAIT, "a recovery")
    until(lambda: not loaders_of(live_workers(Path(run_folder))), WAIT, "workers that load alone")
    assert run.running


def lost_enough(folder: str) -> bool:
    """Kill a loader process, if there is one: it may be one that was ending anyway."""
    for pid in loaders_of(live_workers(Path(folder)))[:1]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(lost_loaders(folder)) >= LOST_LOADERS


def lost_loaders(folder: str) -> list[Any]:
    return events(folder, "lost_loader")


class DeadlySample(Dataset[Any]):
    """One sample kills whoever loads it."""

    def __len__(self) -> int:
        return 104

    def __getitem__(self, index: int) -> Any:
        if index == 33:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(FEATURES), index % CLASSES


class DeadlyData(Vectors):
    def train_data(self) -> Dataset[Any]:
        return DeadlySample()


def test_a_sample_that_kills_loaders_is_named(run_folder: str, yard: Yard) -> None:
    with pytest.raises(PoisonError) as caught:
        yard.run(DeadlyData(), out=run_folder, workers=2, loaders=1, **SMALL)
    assert lost_loaders(run_folder)
    assert re.search(r"its samples are .*\b33\b", caught.value.found)


# What kills whoever touches it.


class DeadlyBatch(Vectors):
    """One held-out sample kills."""

    def metrics(self, model: nn.Module, batch: Any) -> Any:
        if 17 in batch[2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().metrics(model, batch)


def test_a_poisoned_held_out_batch_stops_the_run(run_folder: str, yard: Yard) -> None:
    settings: dict[str, Any] = {**SMALL, "eval_batch_size": 7, "checkpoint_steps": 5}
    with pytest.raises(PoisonError, match="held-out batch 2 after step 5") as caught:
        yard.run(DeadlyBatch(), out=run_folder, **settings)
    assert "14, 15, 16, 17, 18, 19, 20" in caught.value.found
    assert len(events(run_folder, "died")) == POISON_DEATHS


class DeadlyOptimizer(torch.optim.SGD):
    """Kills the process, if it is a worker."""

    armed = False

    def step(self, closure: Any = None) -> Any:
        if self.armed:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(closure)


class DeadlyUpdate(Vectors):
    def scheduler(self, optimizer: torch.optim.Optimizer) -> None:
        """Called in each worker, and not where the optimizer is only tried."""
        DeadlyOptimizer.armed = True

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        return DeadlyOptimizer(params, lr=0.1)


def test_an_update_that_always_kills_stops_the_run(run_folder: str, yard: Yard) -> None:
    with pytest.raises(WorkerLostError, match="step 0 is not committed") as caught:
        yard.run(DeadlyUpdate(), out=run_folder, workers=1, shards=1, **SMALL)
    assert "in phase update" in caught.value.found


# Requests.


def test_a_lone_worker_lets_another_join(endless: Start, run_folder: str) -> None:
    """It waits for nobody, so no barrier tells it: it comes to rest where its lease ends."""
    run = endless(workers=1, max_workers=2, shards=2, out=run_folder)
    run.scale(2)
    until(lambda: formed(run_folder)[-1] == [0, 1], WAIT, "two members")
    run.scale(1)
    until(lambda: formed(run_folder)[-1] == [0], WAIT, "one member")


def formed(folder: str) -> list[list[int]]:
    return [event["seats"] for event in events(folder, "formed")]


def test_a_checkpoint_while_paused(endless: Start, run_folder: str) -> None:
    run = endless(workers=2, shards=2, out=run_folder)
    run.pause()
    until(lambda: events(run_folder, "paused"), WAIT, "a pause")
    run.checkpoint()
    (written,) = until(lambda: events(run_folder, "checkpoint"), WAIT, "a checkpoint")
    (paused,) = events(run_folder, "paused")
    assert written["step"] == paused["step"]
    os.kill(events(run_folder, "joined")[0]["pid"], signal.SIGKILL)
    until(lambda: len(formed(run_folder)) > 2, WAIT, "a replacement")
    run.unpause()
    until(lambda: events(run_folder, "recovered"), WAIT, "the next step")
