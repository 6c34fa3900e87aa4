"""Gradients made small: codecs by themselves, the sums of groups, and runs to the byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import lockstep
from lockstep.errors import JobError, TaskError
from lockstep.job.faults import Fault
from lockstep.planning.shard_placement import ShardPlacement
from lockstep.state.gradient_codecs import CODECS, RUN
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
from tests.zoo.parameters import Double
from tests.zoo.vectors import By

__all__ = ["site", "slow", "yard"]  # fixtures


# Codecs.


def coded(kind: str, numbers: torch.Tensor) -> torch.Tensor:
    """What a codec leaves of numbers."""
    codec = CODECS[kind]
    data = torch.full((codec.nbytes(numbers.numel()),), 0xAA, dtype=torch.uint8)
    codec.encode(numbers, data)
    left = torch.full_like(numbers, torch.nan)
    codec.decode(data, left)
    return left


SIZES = st.one_of(st.integers(1, 3 * RUN), st.sampled_from([RUN, 2 * RUN, 2 * RUN + 1]))


@pytest.mark.parametrize("kind", CODECS)
@given(size=SIZES, seed=st.integers(0, 99), power=st.integers(-20, 20))
def test_what_is_left_is_near(kind: str, size: int, seed: int, power: int) -> None:
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    left = coded(kind, numbers)
    assert torch.equal(left, coded(kind, numbers))
    error = (numbers - left).abs()
    if kind == "bf16":
        assert (error <= numbers.abs() / 256).all()
    elif kind == "int8":
        for run, off in zip(numbers.split(RUN), error.split(RUN), strict=True):
            assert off.max() <= run.abs().max() / 127 * 0.501
    else:
        kept = left != 0
        assert kept.sum() == max(1, -(-size // 100))
        assert torch.equal(left[kept], numbers[kept])
        assert numbers[kept].abs().min() >= numbers[~kept].abs().max() if size > 1 else True


@pytest.mark.parametrize("kind", CODECS)
def test_zeros_stay_zeros(kind: str) -> None:
    assert not coded(kind, torch.zeros(2 * RUN + 7)).any()


def test_hosts_get_whole_groups() -> None:
    arrangement = ShardPlacement.of(12, {"a": 1, "b": 2, "c": 3}, 2)
    assert arrangement.subtrees == tuple(range(at, at + 2) for at in range(0, 12, 2))
    assert [len(part.subtrees) for part in arrangement.parts] == [1, 2, 3]
    crowded = ShardPlacement.of(4, {"a": 8, "b": 8, "c": 8}, 2)
    assert crowded.subtrees == (range(2), range(2, 4)), "with more hosts than groups some have none"


# Runs on one host.

SETTINGS: dict[str, Any] = {
    "shards": 4, "groups": 2, "steps": 6, "batch_size": 16, "seed": 3, "threads": 1, "quiet": True,
}  # fmt: skip


def plain_loop(task: lockstep.Task, kind: str) -> dict[str, torch.Tensor]:
    """The same without Lockstep's engine, for tensors that are one block each."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    seed, steps, batch_size = SETTINGS["seed"], SETTINGS["steps"], SETTINGS["batch_size"]
    seed_everything(seed)
    model = task.model().train()
    optimizer = task.optimizer(lockstep.Parameters(model.named_parameters()))
    data: Any = task.train_data()
    params = list(model.parameters())
    left_out = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    generator = torch.Generator().manual_seed(derive(seed, "order", 0))
    order = torch.randperm(len(data), generator=generator)
    for step in range(steps):
        batch = order[step * batch_size : (step + 1) * batch_size]
        shards = []
        for shard, rows in enumerate(batch.chunk(4)):
            seed_everything(derive(seed, "shard", step, shard))
            model.zero_grad()
            loss = task.loss(model, task.collate([data[int(row)] for row in rows]))
            loss.backward(torch.full_like(loss, 0.25))
            shards.append([p.grad.clone() for p in params if p.grad is not None])
        for index, parameter in enumerate(params):
            halves = []
            for group in range(2):
                total = shards[2 * group][index] + shards[2 * group + 1][index]
                total = total + left_out[group][index]
                left = coded(kind, total.flatten()).view_as(total)
                left_out[group][index] = total - left
                halves.append(left)
            parameter.grad = halves[0] + halves[1]
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", CODECS)
def test_against_a_plain_loop(run_folders: Callable[[], str], kind: str) -> None:
    task = By("AdamW", lr=0.01)
    result = lockstep.run(task, workers=2, compression=kind, out=run_folders(), **SETTINGS)
    wanted = plain_loop(task, kind)
    found = load_file(result.folder / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", CODECS)
def test_same_bits_for_any_number_of_workers(run_folders: Callable[[], str], kind: str) -> None:
    settings = {**SETTINGS, "compression": kind, "args": {"name": "wide"}, "clip_grad_norm": 0.5}
    settings |= {"steps": 4, "data_epochs": None}
    task = "tests.zoo:named"
    runs = [lockstep.run(task, workers=w, out=run_folders(), **settings) for w in (1, 3)]
    assert_same(*runs)
    plain = {**settings, "compression": "none", "groups": None}
    assert lockstep.run(task, workers=2, out=run_folders(), **plain).fingerprint != (
        runs[0].fingerprint
    )


def test_workers_die_and_the_run_is_replayed(run_folders: Callable[[], str]) -> None:
    """Residuals are part of the state: a step that is begun again finds them as they were."""
    settings = {**SETTINGS, "compression": "topk", "steps": 24}
    task = By("Adam", lr=0.01)
    wanted = lockstep.run(task, workers=1, out=run_folders(), **settings)
    faults = tuple(
        Fault(worker_id=-1, step=4 * place + 3, phase=phase)
        for place, phase in enumerate(("backward", "reduce", "update_end", "commit"))
    )
    found = lockstep.run(task, workers=2, out=run_folders(), faults=faults, **settings)
    assert len(events(found.folder, "died")) == len(faults)
    assert_same(found, wanted)
    assert lockstep.verify(found.folder, workers=3, task=task).final


# Runs on several hosts.


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.long) for kind in ("bf16", "int8")), "topk"]
)
@pytest.mark.parametrize("name", ["mixture", pytest.param("cnn", marks=pytest.mark.long)])
def test_same_bits_on_hosts(site: Site, kind: str, name: str) -> None:
    on = site.agents({"b": 1, "c": 1}, 2)
    site.check(name, on, compression=kind, groups=3)
    ended_well(on)


def test_a_host_dies_with_its_residuals(site: Site) -> None:
    on = site.agents({"b": 1, "c": 1}, 1)
    faults = (
        Fault(
            worker_id=0, host="b", step=7, phase="exchange"
        ),  # a worker: its host goes on by itself
        Fault(worker_id=0, host="c", step=11, phase="exchange", kind="host"),
    )
    found = site.check("channels-last", on, steps=16, faults=faults, compression="topk", groups=6)
    assert [event["host"] for event in events(found.folder, "host_lost")] == ["c"]
    ended_well(on, "c")


@pytest.mark.long
def test_hosts_join_and_leave(site: Site, slow: None) -> None:
    check_joining_and_leaving(site, {"b": 1}, "c", "b", compression="int8", groups=6)


# What does not go.


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"groups": 2}, "without compression"),
        ({"compression": "zip"}, "not one of its values"),
        ({"compression": "int8", "groups": 3}, "cannot be divided into these groups"),
        ({"compression": "int8", "ownership": "sharded"}, "does not go with this ownership"),
    ],
)
def test_settings_that_make_no_sense(
    run_folders: Callable[[], str], settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(JobError, match=match):
        lockstep.run(
            By("SGD", lr=0.1), shards=4, workers=1, steps=1, quiet=True, out=run_folders(),
            batch_size=8, **settings,
        )  # fmt: skip


def test_only_float32(run_folders: Callable[[], str]) -> None:
    with pytest.raises(TaskError, match="float32"):
        lockstep.run(
            Double(), shards=2, workers=1, steps=1, quiet=True, out=run_folders(), batch_size=8,
            compression="bf16",
        )  # fmt: skip


def test_fewer_groups_than_hosts(site: Site) -> None:
    on = site.agents({"b": 1, "c": 1}, 1)
    with pytest.raises(JobError, match="fewer groups than hosts"):
        site.run("mlp", on, compression="int8", groups=2, shards=4)
