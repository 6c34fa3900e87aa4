"""Rounds of local steps: the average of copies, with the same bits for any number of workers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lockstep
from lockstep.errors import OptimizerError
from lockstep.job.faults import Fault
from lockstep.system.seeding import derive, seed_everything
from tests.support.harmed_runs import assert_same, events
from tests.support.multi_host_runs import (
    Site,
    check_joining_and_leaving,
    ended_well,
    site,
    slow,
    yard,
)
from tests.zoo.buffers import Images
from tests.zoo.vectors import By, ByEpoch, Scheduled

__all__ = ["site", "slow", "yard"]  # fixtures

SHARDS, STEPS, LOCAL, BATCH, SEED = 2, 4, 3, 12, 3
SETTINGS: dict[str, Any] = {
    "shards": SHARDS, "steps": STEPS, "local_steps": LOCAL, "batch_size": BATCH, "seed": SEED,
    "threads": 1, "quiet": True,
}  # fmt: skip


def plain_loop(task: lockstep.Task, clip_grad_norm: float | None = None) -> dict[str, torch.Tensor]:
    """The same without Lockstep's engine: copies take their steps, each with an optimizer and a
    schedule of its own for the whole time and its own gradient's norm limited, and are averaged."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    seed_everything(SEED)
    model = task.model().train()
    data: Any = task.train_data()
    round_size = BATCH * LOCAL
    order = torch.randperm(
        len(data), generator=torch.Generator().manual_seed(derive(SEED, "order", 0))
    )
    copies = [copy.deepcopy(model) for _ in range(SHARDS)]
    optimizers = [task.optimizer(lockstep.Parameters(each.named_parameters())) for each in copies]
    schedules = [task.scheduler(optimizer) for optimizer in optimizers]
    for step in range(min(STEPS, len(data) // round_size)):
        batch = order[step * round_size : (step + 1) * round_size]
        ways = []
        for shard, rows in enumerate(batch.chunk(SHARDS)):
            seed_everything(derive(SEED, "shard", step, shard))
            local, optimizer, schedule = copies[shard], optimizers[shard], schedules[shard]
            local.load_state_dict(model.state_dict())
            for some in rows.chunk(LOCAL):
                optimizer.zero_grad()
                task.loss(local, task.collate([data[int(row)] for row in some])).backward()
                if clip_grad_norm is not None:
                    torch.nn.utils.clip_grad_norm_(local.parameters(), clip_grad_norm)
                optimizer.step()
                if schedule is not None:
                    schedule.step()
            ways.append(
                [
                    (a - b).detach() * 0.5
                    for a, b in zip(model.parameters(), local.parameters(), strict=True)
                ]
            )
        with torch.no_grad():
            for parameter, first, second in zip(model.parameters(), *ways, strict=True):
                parameter -= first + second
    return {name: value.detach() for name, value in model.state_dict().items()}


TASKS: dict[str, lockstep.Task] = {
    "averages": By("AdamW", lr=0.01),
    "momentum and a schedule": Scheduled("SGD", lr=0.1, momentum=0.9),
    "state from the start": By("Adagrad", lr=0.05, initial_accumulator_value=0.1),
    "nothing to keep": By("SGD", lr=0.1),
}


@pytest.mark.parametrize("name", TASKS)
def test_the_average_of_copies(run_folders: Callable[[], str], name: str) -> None:
    """One data epoch's worth, against a plain loop, to the byte."""
    task = TASKS[name]
    settings = {**SETTINGS, "steps": 3}
    result = lockstep.run(task, workers=2, out=run_folders(), **settings)
    wanted = plain_loop(task)
    found = load_file(result.folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_each_local_step_has_its_norm_limited(run_folders: Callable[[], str]) -> None:
    """By the norm of the shard's own gradient, which is in some steps below the limit; a loop that
    limits none of them comes to something else."""
    task, limit = By("AdamW", lr=0.01), 0.6
    settings = {**SETTINGS, "steps": 3, "clip_grad_norm": limit}
    runs = [lockstep.run(task, workers=w, out=run_folders(), **settings) for w in (1, 2)]
    assert_same(*runs)
    found = load_file(runs[0].folder / "model.safetensors")
    for name, value in plain_loop(task, limit).items():
        assert torch.equal(found[name], value), name
    assert any(not torch.equal(found[name], value) for name, value in plain_loop(task).items())
    assert lockstep.verify(runs[1].folder, workers=1, task=task).final


def test_same_bits_for_any_number_of_workers(run_folders: Callable[[], str]) -> None:
    """With batch statistics, and a round that is short at the data epoch's end."""
    task = Images("SGD", lr=0.1, momentum=0.9)
    settings = {**SETTINGS, "shards": 3, "steps": 7}
    runs = [lockstep.run(task, workers=w, out=run_folders(), **settings) for w in (1, 3)]
    assert_same(*runs)
    single = lockstep.run(task, workers=1, out=run_folders(), **{**settings, "local_steps": 1})
    assert single.fingerprint != runs[0].fingerprint


def test_workers_die_and_the_run_is_replayed(run_folders: Callable[[], str]) -> None:
    """What a shard's optimizer keeps is a part of the state, whoever computes the shard; and what
    auditors compute again is compared, too."""
    task = ByEpoch("Adam", lr=0.01)
    settings = {**SETTINGS, "shards": 3, "steps": 24}
    wanted = lockstep.run(task, workers=1, out=run_folders(), **settings)
    phases = ("backward", "slot", "reduce", "update_end", "commit")
    faults = tuple(
        Fault(worker_id=-1, step=4 * place + 3, phase=phase) for place, phase in enumerate(phases)
    )
    found = lockstep.run(task, workers=2, out=run_folders(), faults=faults, audit=0.5, **settings)
    assert len(events(found.folder, "died")) == len(faults)
    assert not events(found.folder, "corrupt")
    assert_same(found, wanted)
    assert lockstep.verify(found.folder, workers=3, task=task).final


def test_rounds_go_on_from_a_checkpoint(run_folders: Callable[[], str]) -> None:
    """Averages, and the schedule's place, are those of the checkpoint."""
    task = Scheduled("Adam", lr=0.01)
    settings = {**SETTINGS, "steps": 4, "checkpoint_steps": 2}
    found = lockstep.run(task, workers=2, out=run_folders(), **settings)
    verified = lockstep.verify(found.folder, steps=(3, None), workers=1, task=task)
    assert verified.first == 2
    assert verified.final


# Runs on several hosts.


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"ownership": "sharded", "clip_grad_norm": 0.6},
        pytest.param({"compression": "int8"}, marks=pytest.mark.long),
    ],
)
def test_same_bits_on_hosts(site: Site, settings: dict[str, Any]) -> None:
    """A host dies with what its shards' optimizers have kept: all go back to the master's base."""
    on = site.agents({"b": 1, "c": 1}, 1)
    faults = (
        Fault(
            worker_id=0, host="b", step=7, phase="exchange"
        ),  # a worker: its host goes on by itself
        Fault(worker_id=0, host="c", step=11, phase="exchange", kind="host"),
    )
    found = site.check("adam", on, steps=16, faults=faults, local_steps=2, **settings)
    assert [event["host"] for event in events(found.folder, "host_lost")] == ["c"]
    ended_well(on, "c")


@pytest.mark.long
def test_hosts_join_and_leave(site: Site, slow: None) -> None:
    check_joining_and_leaving(site, {"b": 1}, "c", "b", local_steps=2)


# What does not go.


def test_what_does_not_go_with_it(run_folders: Callable[[], str]) -> None:
    with pytest.raises(OptimizerError, match="sparse gradients"):
        lockstep.run(
            "tests.collectives.test_sparse_gradients:Sparse", args={"optimizer": "SparseAdam"},
            workers=1, out=run_folders(), **SETTINGS,
        )  # fmt: skip
