"""Workers with homes of their own: one fingerprint, whatever happens to them.

Each run with `device: cpu-apart` is compared, byte by byte, with an undisturbed one of workers that
share their memory: ledger, state, model, metrics.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lockstep
from lockstep.agent import worker_group as worker_group
from lockstep.agent.recovery import POISON_DEATHS
from lockstep.errors import (
    JobError,
    LockstepError,
    NonFiniteError,
    PoisonError,
    StoppedError,
    TaskError,
)
from lockstep.job.faults import PHASES, Fault
from lockstep.job.task import Task
from tests.support.harmed_runs import (
    Yard,
    assert_same,
    assert_struck,
    events,
    ledger,
    until,
    yard,
)
from tests.support.paced_task import PACE
from tests.support.watched_device import Counts, Forgetful, Staged
from tests.zoo import FAILING, MORE, ZOO, Entry
from tests.zoo import optimizers as own
from tests.zoo.buffers import Images

__all__ = ["yard"]  # a fixture
TASKS = {**ZOO, **MORE}
APART: dict[str, Any] = {"device": "cpu-apart"}
QUICK = {"cnn": 2, "transformer": 4, "clip-sometimes": 3, "wide-branches": 2, "mixture": 3}
"""Tasks of each kind, with a number of workers: buffers and BatchNorm, dropout, a limited norm of
gradients that some shards lack, blocks of a cut weight, shards without any gradient."""
UNDIVIDED: dict[str, Task] = {
    "distance": own.WithOwn(own.Distance),
    "soap": own.WithOwn(own.Soap),
    "clips": own.WithOwn(own.Clips, lr=0.1),
    "lamb": own.WideWithOwn(own.Lamb),
    "galore": own.WithOwn(own.GaLore),
}
"""Optimizers that one worker steps alone, with options and attributes that they change."""


def settings_of(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    entry: Entry = TASKS[name]
    return entry.task, {**entry.settings(), **changes}


# How many there are.


@pytest.mark.parametrize(("name", "workers"), QUICK.items())
def test_kinds_of_tasks(name: str, workers: int, yard: Yard) -> None:
    task, settings = settings_of(name)
    yard.check(task, workers=workers, **APART, **settings)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_numbers_of_workers(workers: int, yard: Yard) -> None:
    """Five shards: none of these numbers divides them, and the tree is uneven."""
    task, settings = settings_of("channels-last")  # with buffers and clip_grad_norm
    yard.check(task, workers=workers, shards=5, **APART, **settings)


class Unevaluated(Images):
    """Nothing is evaluated before the first step: nobody comes to rest there."""

    def eval_data(self) -> None:
        return None


def test_shards_that_workers_do_not_divide(yard: Yard) -> None:
    """From the very first step on, and in a step that is begun again."""
    settings = {"batch_size": 24, "steps": 8, "shards": 4}
    faults = (Fault(worker_id=1, step=4, phase="update_end"),)
    task = Unevaluated("Adam", lr=0.01)
    result = yard.check(task, workers=3, faults=faults, **APART, **settings)
    assert_struck(result.folder, faults)


@pytest.mark.long
@pytest.mark.parametrize("shards", [3, 4, 6, 7, 8])
@pytest.mark.parametrize("name", ["cnn", "wide-clipped"])
def test_numbers_of_shards(name: str, shards: int, yard: Yard) -> None:
    task, settings = settings_of(name)
    for workers in range(1, min(shards, 4) + 1):
        yard.check(task, workers=workers, shards=shards, **APART, **settings)


def test_one_shard(yard: Yard) -> None:
    task, settings = settings_of("channels-last", workers=1, shards=1)
    assert_same(yard.run(task, **APART, **settings), yard.run(task, **settings))


@pytest.mark.long
@pytest.mark.parametrize("name", [*ZOO, *MORE])
def test_all_tasks(name: str, yard: Yard) -> None:
    task, settings = settings_of(name)
    for workers in (1, 3, 5):
        yard.check(task, workers=workers, **APART, **settings)


def test_slices(yard: Yard) -> None:
    task, settings = settings_of("mlp", slices=2)
    yard.check(task, workers=3, **APART, **settings)


# Deaths.

BETWEEN = 5
"""Steps between two deaths."""
KINDS = ("kill", "segfault", "exit")


def in_every_phase() -> tuple[Fault, ...]:
    """A death in each phase, one after another."""
    return tuple(
        Fault(worker_id=-1, step=BETWEEN * (place + 1), phase=phase, kind=kind)  # type: ignore[arg-type]
        for place, (phase, kind) in enumerate(zip(PHASES, itertools.cycle(KINDS), strict=False))
    )


@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("cnn", 3),
        pytest.param("cnn", 1, marks=pytest.mark.long),
        pytest.param("cnn", 2, marks=pytest.mark.long),
        pytest.param("cnn", 5, marks=pytest.mark.long),
        pytest.param("channels-last", 4, marks=pytest.mark.long),  # with clip_grad_norm
        pytest.param("transformer", 3, marks=pytest.mark.long),
        pytest.param("wide-branches", 2, marks=pytest.mark.long),
        pytest.param("mixture", 2, marks=pytest.mark.long),
    ],
)
def test_a_death_in_every_phase(name: str, workers: int, yard: Yard) -> None:
    faults = in_every_phase()
    task, settings = settings_of(name, steps=BETWEEN * (len(PHASES) + 1))
    result = yard.check(task, workers=workers, faults=faults, **APART, **settings)
    assert_struck(result.folder, faults)


MEET = ("barrier", "reduce", "update_begin", "update_end", "update_done", "commit", "audit")


@pytest.mark.parametrize("every", [1, 1_000_000])
def test_all_die_in_every_phase_of_one_step(
    every: int, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the snapshot is brought up to date in each step, so that they die in the midst of
    it, or never."""
    monkeypatch.setattr(worker_group, "steps_between", lambda *_: every)
    faults = tuple(Fault(worker_id=w, step=7, phase=phase) for phase in MEET for w in (0, 1))
    task, settings = settings_of("cnn")
    result = yard.check(task, workers=2, faults=faults, **APART, **settings)
    assert len(events(result.folder, "died")) > len(MEET)


def test_steps_since_the_snapshot_are_computed_again(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody had begun to update: the dead worker's home is gone."""
    monkeypatch.setattr(worker_group, "steps_between", lambda *_: 1_000_000)
    task, settings = settings_of("clip")
    fault = Fault(worker_id=1, step=3, phase="forward")
    result = yard.check(task, workers=2, faults=(fault,), **APART, **settings)
    assert_struck(result.folder, (fault,))
    assert result.recoveries[0]["steps_back"] == 3


@pytest.mark.parametrize(
    "name",
    [
        n if n in ("distance", "soap") else pytest.param(n, marks=pytest.mark.long)
        for n in UNDIVIDED
    ],
)
def test_undivided_optimizers(name: str, yard: Yard) -> None:
    """The worker that has all of the state dies, and so does another; a successor has to know."""
    faults = (
        Fault(worker_id=0, step=3, phase="update_end"),
        Fault(worker_id=1, step=6, phase="forward"),
        Fault(worker_id=0, step=9, phase="commit"),
    )
    settings = {"batch_size": 26, "steps": 12, "seed": 3, "shards": 4}
    result = yard.check(UNDIVIDED[name], workers=2, faults=faults, **APART, **settings)
    assert_struck(result.folder, faults)


def test_a_poisoned_shard_stops_the_run(yard: Yard) -> None:
    """Each death takes the others back; what is kept is the snapshot, and goes on without it."""
    poison = Fault(worker_id=-1, step=8, phase="forward", shard=4, repeat=True)
    task, settings = settings_of("cnn")
    folder = yard.path()
    with pytest.raises(PoisonError, match="shard 4 of step 8"):
        yard.run(task, faults=(poison,), checkpoint_steps=3, out=folder, **APART, **settings)
    assert len(events(folder, "died")) == POISON_DEATHS
    resumed = lockstep.resume(folder, task=task, workers=2, quiet=True)
    assert 6 <= events(folder, "resumed")[0]["step"] <= 8
    assert_same(resumed, yard.undisturbed(task, **settings))


def test_a_loss_that_is_not_finite_keeps_a_sound_state(yard: Yard) -> None:
    entry, folder = FAILING["turns-nan"], yard.path()
    with pytest.raises(NonFiniteError):
        yard.run(entry.task, out=folder, checkpoint_steps=2, **APART, **entry.settings())
    with pytest.raises(NonFiniteError):
        lockstep.resume(folder, task=entry.task, workers=2, quiet=True)


# Workers come and go; the run is stopped, goes on, and is verified.


@pytest.mark.long
def test_scaled_while_running(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    task, folder = "tests.support.paced_task:Paced", yard.path()
    settings: dict[str, Any] = {"batch_size": 24, "seed": 5, "steps": 150}
    monkeypatch.setenv(PACE, "0.01")
    run = lockstep.start(
        task, out=folder, quiet=True, workers=1, shards=6, threads=1, **APART, **settings
    )
    until(lambda: steps_of(folder) > 10, 60, "step 10")
    for workers in (3, 2):
        run.scale(workers)
        until(lambda: formed(folder) == workers, 60, f"{workers} members")  # noqa: B023
    result = run.result(60)
    monkeypatch.setenv(PACE, "0")
    assert_same(result, yard.undisturbed(task, **settings))


def formed(folder: str) -> int:
    """How many members there are."""
    return len(events(folder, "formed")[-1]["seats"])


def steps_of(folder: str) -> int:
    """How many lines the ledger has so far."""
    path = Path(folder, "ledger.jsonl")
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(("first", "then"), [("cpu", "cpu-apart"), ("cpu-apart", "cpu")])
def test_resumed_on_the_other_device(
    first: str, then: str, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, folder = "tests.support.paced_task:Paced", yard.path()
    settings: dict[str, Any] = {"batch_size": 24, "seed": 5, "steps": 200}
    monkeypatch.setenv(PACE, "0.01")
    run = lockstep.start(
        task, out=folder, quiet=True, workers=2, shards=6, threads=1, device=first, **settings
    )
    until(lambda: steps_of(folder) > 20, 60, "step 20")
    run.stop()
    with pytest.raises(StoppedError):
        run.result(60)
    monkeypatch.setenv(PACE, "0")
    resumed = lockstep.resume(folder, workers=3, device=then, quiet=True)
    assert_same(resumed, yard.undisturbed(task, **settings))


def test_checkpoints_and_verification(yard: Yard) -> None:
    task, settings = settings_of("cnn", checkpoint_steps=5)
    apart = yard.check(task, workers=2, **APART, **settings)
    alike = yard.run(task, workers=3, **settings)
    found, wanted = (
        {path.name: path.read_bytes() for path in sorted(one.folder.glob("checkpoints/*/*"))}
        for one in (apart, alike)
    )
    assert found == wanted
    assert found
    checked = lockstep.verify(apart.folder, task=task, workers=3)
    assert (checked.first, checked.last, checked.final) == (0, settings["steps"], True)


class Remembers(Unevaluated):
    """Nothing comes of it in the first calls."""

    calls = 0

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.calls += 1
        return super().loss(model, batch) * (1 + max(0, self.calls - 10))


@pytest.mark.parametrize("workers", [1, 2])
def test_pristine_forks_compute_from_the_mirror(workers: int, yard: Yard) -> None:
    """In each step a shard is computed again, by a fork that has no home: from the parameters and
    buffers of just then. What remembers is found."""
    settings = {"batch_size": 24, "steps": 6, "shards": 4, "purity": 1.0}
    yard.check(Unevaluated("Adam", lr=0.01), workers=workers, **APART, **settings)
    with pytest.raises(TaskError, match="something remembers"):
        yard.run(Remembers("Adam", lr=0.01), workers=workers, **APART, **settings)


# What is moved.


def moved(result: lockstep.Result) -> list[tuple[float, float]]:
    """By step: how many bytes had been moved, and how often a worker had come to rest."""
    lines = map(json.loads, ledger(result.folder).splitlines())
    logged = [line["logged"] for line in lines if "logged" in line]
    return [(float.fromhex(each["moved"]), float.fromhex(each["rests"])) for each in logged]


def test_a_lone_worker_moves_nothing(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """But what it begins with, and what it leaves at rest; and two do so in each step."""
    monkeypatch.setattr(worker_group, "steps_between", lambda *_: 1_000_000)
    settings = {
        "batch_size": 24, "steps": 60, "seed": 5, "purity": 0.0, "shards": 2, "evaluate": False,
        "checkpoint_steps": 100, **APART,
    }  # fmt: skip
    alone = moved(yard.run(Counts(), workers=1, **settings))
    assert alone[0][0] > 0
    pairs = list(itertools.pairwise(alone))
    assert all((after[0] > before[0]) == (after[1] > before[1]) for before, after in pairs)
    assert sum(after == before for before, after in pairs) > len(pairs) / 2
    two = moved(yard.run(Counts(), workers=2, **settings))
    assert all(after > before for before, after in itertools.pairwise(two))


CALLERS = ("join", "give_gradients", "take_gradients", "give_state", "take_parameters", "_give_all")


@pytest.mark.parametrize(
    "caller",
    [c if c in ("give_gradients", "take_parameters") else pytest.param(c, marks=pytest.mark.long)
     for c in CALLERS],
)  # fmt: skip
def test_a_settle_that_is_left_out_gives_another_fingerprint(caller: str, yard: Yard) -> None:
    entry = ZOO["cnn"]
    settings = entry.settings()
    wanted = yard.undisturbed(entry.task, **settings).fingerprint
    whole = yard.run(Forgetful("nobody"), workers=2, **APART, **settings)
    assert whole.fingerprint == wanted
    try:
        found = yard.run(Forgetful(caller), workers=2, **APART, **settings).fingerprint
    except LockstepError:
        return
    assert found != wanted


def test_what_cuda_is_made_of_computes_the_same_on_a_cpu(yard: Yard) -> None:
    """Staging, placement, and homes that torch allocates: with deaths, with `cpu-apart` named."""
    settings = {**ZOO["cnn"].settings(), "clip_grad_norm": 0.5}
    faults = (
        Fault(worker_id=1, step=4, phase="update_begin"),
        Fault(worker_id=-1, step=8, phase="backward"),
    )
    staged = yard.run(Staged(), workers=3, faults=faults, **APART, **settings)
    assert_struck(staged.folder, faults)
    plain = yard.run(Images("Adam", lr=0.01), **settings)
    assert staged.fingerprint == plain.fingerprint
    assert (staged.metrics, staged.history) == (plain.metrics, plain.history)


# What is refused.


@pytest.mark.parametrize(
    "settings",
    [
        {"compression": "bf16"}, {"local_steps": 2}, {"audit": 0.5}, {"compile": True},
        {"team": 2, "slices": 2, "workers": 2},
    ],
)  # fmt: skip
def test_settings_that_do_not_go_with_homes(settings: dict[str, Any]) -> None:
    with pytest.raises(JobError, match=f"{next(iter(settings))} does not go with device"):
        lockstep.Job(task=Images("SGD", lr=0.1), device="cpu-apart", **settings)


def test_large_tables_are_refused_by_name(yard: Yard) -> None:
    with pytest.raises(TaskError, match="large embedding tables") as caught:
        yard.run("tests.support.large_table:LargeTable", batch_size=24, steps=3, **APART)
    assert "0.weight" in caught.value.found


def test_cuda_needs_to_be_asked_for(yard: Yard) -> None:
    with pytest.raises(JobError, match="has not been run on a GPU"):
        lockstep.Job(task=Images("SGD", lr=0.1), device="cuda")


def test_the_device_is_in_the_identity_only_where_it_counts() -> None:
    from lockstep.results.manifest import counted

    assert counted("device", "cpu-apart") == counted("device", "cpu") == "cpu"
    assert counted("device", "cuda") == "cuda"


def test_a_run_does_not_go_on_to_other_numbers() -> None:
    plan = lockstep.plan(Images("SGD", lr=0.1), workers=1, batch_size=24, steps=3)
    assert plan.with_device("cpu-apart") == dataclasses.replace(plan, device="cpu-apart")
    with pytest.raises(JobError, match="does not go on to the same numbers"):
        plan.with_device("cuda")
    with pytest.raises(JobError, match="team does not go with device"):
        dataclasses.replace(plan, device="cpu-apart", slices=2).resized(2, 2)
