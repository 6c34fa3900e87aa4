"""Steps without the interpreter: the bytes of those with it, whatever happens."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lockstep
from benchmarks.harm import live_workers
from lockstep.job.faults import Fault
from tests.support.harmed_runs import Yard, assert_same, assert_struck, events, until, yard
from tests.support.native_path import native, native_module, refused, taken
from tests.zoo import MORE, ZOO
from tests.zoo.vectors import By, Scheduled

__all__ = ["native", "native_module", "yard"]  # fixtures

WAIT = 60.0
TASKS = {**ZOO, **MORE}
ALWAYS: dict[str, Any] = {"trace": "always", "native": "auto"}
SHORT = {
    "fused-sgd": True, "fused-adam": True, "augmented": False, "cnn": False, "bf16": False,
}  # fmt: skip
"""Tasks of the zoo, and whether their steps are of the plain case."""
LONG = [pytest.param(name, marks=pytest.mark.long) for name in TASKS if name not in SHORT]
FUSED = By("AdamW", lr=0.01, fused=True)
SETTINGS: dict[str, Any] = {"steps": 40, "batch_size": 26, "seed": 3, "evaluate": False}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", [*SHORT, *LONG])
def test_the_bytes_of_the_interpreter(
    name: str, workers: int, yard: Yard, native_module: Any
) -> None:
    """Also where the last step of a data epoch has fewer samples than there are shards."""
    entry = TASKS[name]
    with_it = yard.run(entry.task, workers=workers, **ALWAYS, **entry.settings())
    key = {**entry.settings(), "native": "never"}
    without = yard.run(entry.task, workers=workers, trace="never", **key)
    assert_same(with_it, without)
    assert not events(without.folder, "native")
    if name in SHORT:
        assert bool(refused(with_it.folder)) is not SHORT[name]
        if SHORT[name]:
            assert taken(with_it.folder) == set(range(workers))


def test_shards_without_the_interpreter(yard: Yard, native_module: Any) -> None:
    for name in ("bf16-parameters", "onecycle"):
        entry = TASKS[name]
        result = yard.run(entry.task, **ALWAYS, **entry.settings())
        said = events(result.folder, "traced")
        assert said
        assert all(event["native"] for event in said)
        assert not any(event["why_not_native"] for event in said)


def test_one_shard(yard: Yard, native_module: Any) -> None:
    """There is no sum then: the gradients are those of the slot."""
    found = yard.run(FUSED, shards=1, workers=1, **ALWAYS, **SETTINGS)
    assert taken(found.folder) == {0}
    assert_same(found, yard.run(FUSED, shards=1, workers=1, native="never", **SETTINGS))


class OddRates(Scheduled):
    """The rates of the groups differ, and one of them is told."""

    def optimizer(self, params: Any) -> torch.optim.Optimizer:
        params = list(params)
        groups = [{"params": params[:1], "lr": 0.1}, {"params": params[1:], "weight_decay": 0.1}]
        return torch.optim.AdamW(groups, lr=0.01, amsgrad=True, fused=True)


def test_a_schedule_and_its_told_rates(native: str, yard: Yard) -> None:
    task, settings = OddRates(""), {**SETTINGS, "steps": 12}
    result = yard.run(task, native=native, **settings)
    assert_same(result, yard.run(task, native="never", **settings))
    assert bool(taken(result.folder)) is (native == "auto")


@pytest.mark.parametrize(
    "phase", ["barrier", "reduce", "update_begin", "update_end", "update_done", "commit"]
)
def test_a_death_beside_native_workers(phase: str, yard: Yard, native_module: Any) -> None:
    """The one that a fault is to strike is run by the interpreter; the others are native, and have
    updated their blocks, or wait, when it dies."""
    faults = (Fault(worker_id=1, step=6, phase=phase),)
    result = yard.check(FUSED, faults=faults, shards=3, **{**SETTINGS, "steps": 12})
    assert_struck(result.folder, faults)
    assert {0, 2} <= taken(result.folder)


class Held(By):
    """The worker whose process id is in a file is slow."""

    def __init__(self, gate: Path) -> None:
        super().__init__("AdamW", lr=0.01, fused=True)
        self.gate = gate

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if self.gate.exists() and self.gate.read_text() == str(os.getpid()):
            time.sleep(0.2)
        return super().loss(model, batch)


def sleeps_in_futex(pid: int) -> bool:
    return Path(f"/proc/{pid}/wchan").read_text().startswith("futex")


Harm = Callable[[lockstep.Run, int], None]


def kill(run: lockstep.Run, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def scale(run: lockstep.Run, pid: int) -> None:
    run.scale(2)


@pytest.mark.parametrize("harm", [kill, scale])
def test_while_workers_wait_in_native_code(
    harm: Harm, native: str, yard: Yard, tmp_path: Path
) -> None:
    task, folder = Held(tmp_path / "gate"), yard.path()
    settings = {**SETTINGS, "steps": 300, "purity": 0.0, "shards": 3, "workers": 3}
    run = lockstep.start(task, out=folder, quiet=True, threads=1, native=native, **settings)
    until(Path(folder, "events.jsonl").exists, WAIT, "a run")
    until(lambda: len(events(folder, "joined")) == 3, WAIT, "three workers")
    pids = {event["worker"]: event["pid"] for event in events(folder, "joined")}
    task.gate.write_text(str(pids[0]))
    if native == "auto":
        until(lambda: taken(folder) == {0, 1, 2}, WAIT, "native steps")
    until(lambda: sleeps_in_futex(pids[1]), WAIT, "a worker that waits")
    harm(run, pids[1])
    wanted = "died" if harm is kill else "regroup"
    until(lambda: events(folder, wanted), WAIT, wanted)
    task.gate.unlink()
    result = run.result(WAIT)
    assert_same(result, yard.run(Held(tmp_path / "none"), native="never", **settings))


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 2))])
def test_killed_at_any_time(seed: int, yard: Yard, native_module: Any) -> None:
    """Updates take a large part of these steps."""
    entry = dataclasses.replace(MORE["wide"], steps=400)
    task = type(entry.task)("AdamW", lr=0.01, fused=True)  # type: ignore[call-arg]
    settings = {**entry.settings(), "shards": 3, "workers": 3, "evaluate": False, "purity": 0.0}
    folder = yard.path()
    run = lockstep.start(task, out=folder, quiet=True, threads=1, **ALWAYS, **settings)
    until(Path(folder, "events.jsonl").exists, WAIT, "a run")
    deaths = 0
    while run.running and deaths < 4:
        if len(events(folder, "native")) >= 3 + deaths:  # all are at work, successors too
            time.sleep(0.0137 * (seed + 1))
            os.kill(live_workers(Path(folder))[deaths % 3], signal.SIGKILL)
            deaths += 1
        time.sleep(0.005)
    result = run.result(WAIT)
    assert deaths
    assert len(events(folder, "died")) == deaths
    assert_same(result, yard.undisturbed(task, **settings, trace="never", native="never"))


REFUSED: dict[str, dict[str, Any]] = {
    "an audit": {"audit": 1.0},
    "the gradient's norm is limited": {"clip_grad_norm": 0.1},
    "a step has several updates": {"local_steps": 2, "batch_size": 52},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_plain_is_left_to_the_interpreter(
    reason: str, yard: Yard, native_module: Any
) -> None:
    settings = {**SETTINGS, "steps": 8, **REFUSED[reason]}
    result = yard.run(FUSED, **settings)
    assert taken(result.folder) == set()
    assert refused(result.folder) == {reason}
    assert_same(result, yard.run(FUSED, native="never", **settings))
