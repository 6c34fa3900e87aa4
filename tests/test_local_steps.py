"""Rounds of local steps: the average of copies, with the same bits for any number of workers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lockstep
from lockstep.errors import JobError, TaskError
from lockstep.local_steps import divide
from lockstep.seeds import derive, seed_everything
from tests.faulty import assert_same
from tests.zoo import By, Images, Scheduled

SHARDS, STEPS, LOCAL, BATCH, SEED = 2, 4, 3, 12, 3
SETTINGS: dict[str, Any] = {
    "shards": SHARDS, "steps": STEPS, "local_steps": LOCAL, "batch_size": BATCH, "seed": SEED,
    "threads": 1, "quiet": True,
}  # fmt: skip


def plain_loop(task: lockstep.Task) -> dict[str, torch.Tensor]:
    """The same without Lockstep's engine: copies take their steps, and are averaged."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    seed_everything(SEED)
    model = task.model().train()
    data: Any = task.train_data()
    round_size = BATCH * LOCAL
    order = torch.randperm(
        len(data), generator=torch.Generator().manual_seed(derive(SEED, "order", 0))
    )
    for step in range(min(STEPS, len(data) // round_size)):
        batch = order[step * round_size : (step + 1) * round_size]
        ways = []
        for shard, rows in enumerate(batch.chunk(SHARDS)):
            seed_everything(derive(SEED, "shard", step, shard))
            local = copy.deepcopy(model)
            optimizer = task.optimizer(lockstep.Parameters(local.named_parameters()))
            for some in rows.chunk(LOCAL):
                optimizer.zero_grad()
                task.loss(local, task.collate([data[int(row)] for row in some])).backward()
                optimizer.step()
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


def test_the_average_of_copies(run_folders: Callable[[], str]) -> None:
    """One data epoch's worth, against a plain loop, to the byte."""
    task = By("AdamW", lr=0.01)
    settings = {**SETTINGS, "steps": 3}
    result = lockstep.run(task, workers=2, out=run_folders(), **settings)
    wanted = plain_loop(task)
    found = load_file(result.folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_same_bits_for_any_number_of_workers(run_folders: Callable[[], str]) -> None:
    """With batch statistics, and a round that is short at the data epoch's end."""
    task = Images("SGD", lr=0.1, momentum=0.9)
    settings = {**SETTINGS, "shards": 3, "steps": 7}
    runs = [lockstep.run(task, workers=w, out=run_folders(), **settings) for w in (1, 3)]
    assert_same(*runs)
    single = lockstep.run(task, workers=1, out=run_folders(), **{**settings, "local_steps": 1})
    assert single.fingerprint != runs[0].fingerprint


def test_what_does_not_go_with_it(run_folders: Callable[[], str]) -> None:
    with pytest.raises(TaskError, match="learning-rate schedule"):
        lockstep.run(Scheduled("SGD", lr=0.1), workers=1, out=run_folders(), **SETTINGS)
    with pytest.raises(JobError, match="clip_grad_norm"):
        lockstep.run(By("SGD", lr=0.1), out=run_folders(), clip_grad_norm=1.0, **SETTINGS)


@pytest.mark.parametrize(("count", "parts"), [(12, [4, 4, 4]), (7, [2, 2, 3]), (2, [1, 1])])
def test_samples_are_divided(count: int, parts: list[int]) -> None:
    found = divide(list(range(count)), 3)
    assert [len(part) for part in found] == parts
    assert [item for part in found for item in part] == list(range(count))
