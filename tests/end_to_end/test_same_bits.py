"""Invariant 1: the same bits for any number of workers, and the bits are plain PyTorch's.

Each task of the zoo is run by Lockstep and trained by `tests/support/reference_loop.py`, which
knows nothing of Lockstep. Parameters, buffers, optimizer state, losses, gradient norms and metrics
are compared as bytes. Nothing here has a tolerance, and none may be given one.

A run starts Python and torch, which takes seconds. So by default each task runs on one worker and
on 2, 3 or 5, in turn; all together, every count is tried on many tasks. `make test-long` does the
full cross product, and more tasks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lockstep
from lockstep.errors import TaskError
from lockstep.job.task import Task
from lockstep.results.ledger import read_ledger
from tests.support import reference_loop as reference
from tests.zoo import MORE, ZOO, Entry
from tests.zoo.parameters import Teacher
from tests.zoo.sequences import MaxNorm
from tests.zoo.vectors import BATCH, HELD_OUT

SHARDS = 6
TASKS = {**ZOO, **MORE}


def default_workers(name: str) -> tuple[int, int]:
    """One worker, and another number."""
    return 1, (3, 2, 5)[list(ZOO).index(name) % 3]


class Runs:
    """Lockstep's runs of the zoo. Each is made once; several of one task go on side by side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: dict[tuple[str, int, int], lockstep.Result] = {}
        self._numbers = itertools.count()

    def get(self, name: str, workers: Sequence[int], shards: int = SHARDS) -> list[lockstep.Result]:
        """The results of a task for these numbers of workers."""
        missing = [count for count in workers if (name, count, shards) not in self._done]
        with ThreadPoolExecutor(2) as pool:
            made = [pool.submit(self.run, name, workers=w, shards=shards) for w in missing]
            for count, future in zip(missing, made, strict=True):
                self._done[name, count, shards] = future.result()
        return [self._done[name, count, shards] for count in workers]

    def run(self, name: str, **settings: Any) -> lockstep.Result:
        entry = TASKS[name]
        number = next(self._numbers)
        settings = {"threads": 1, **entry.settings(), **settings}
        return lockstep.run(
            entry.task, out=str(self.folder / f"{name}-{number}"), quiet=True, **settings
        )


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@functools.cache
def expected(name: str, shards: int = SHARDS) -> reference.Outcome:
    return reference.train(TASKS[name].task, shards=shards, **TASKS[name].settings())


# Comparisons.


def raw(value: Any) -> bytes:
    """The bits of a tensor, or of a number as a checkpoint holds it."""
    if not isinstance(value, torch.Tensor):
        value = torch.tensor(
            value, dtype=torch.float64 if isinstance(value, float) else torch.int64
        )
    flat = value.detach().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy().data)


def assert_same_tensors(found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    """Bits of every tensor; the message says by how much they differ."""
    assert found.keys() == wanted.keys(), what
    wrong = {}
    for name, value in wanted.items():
        if raw(found[name]) != raw(value):
            there, here = torch.as_tensor(found[name]), torch.as_tensor(value)
            apart = (there.double() - here.double().reshape(there.shape)).abs().max().item()
            wrong[name] = f"{there.dtype} {tuple(there.shape)}: at most {apart:.3g} apart"
    assert not wrong, f"{what} differ from the reference: {wrong}"


def ledger_of(result: lockstep.Result) -> list[dict[str, Any]]:
    """The steps of a run's ledger."""
    lines = [line.content for line in read_ledger(result.folder / "ledger.jsonl")]
    return [line for line in lines if "step" in line]


def norms_of(result: lockstep.Result) -> list[float]:
    return [float.fromhex(line["norm"]) for line in ledger_of(result) if "norm" in line]


def state_of(result: lockstep.Result) -> dict[str, torch.Tensor]:
    """What the last checkpoint holds besides the module's state dict."""
    folder = result.folder / "checkpoints" / f"step-{result.steps:08d}"
    assert (folder / "model.safetensors").read_bytes() == model_file(result)
    return load_file(folder / "state.safetensors")


def model_file(result: lockstep.Result) -> bytes:
    return (result.folder / "model.safetensors").read_bytes()


def ledger_file(result: lockstep.Result) -> bytes:
    return (result.folder / "ledger.jsonl").read_bytes()


def assert_equals_reference(result: lockstep.Result, wanted: reference.Outcome) -> None:
    steps = ledger_of(result)
    assert [float.fromhex(line["loss"]) for line in steps] == wanted.losses
    assert norms_of(result) == wanted.norms
    found = load_file(result.folder / "model.safetensors")
    assert_same_tensors(found, wanted.model, "the module's state")
    assert model_file(result) == wanted.file()
    assert_state_equals(state_of(result), wanted)
    history = [(item["step"], item["metrics"]) for item in result.history]
    assert history == wanted.evaluations
    last = wanted.evaluations[-1][1] if wanted.evaluations else {}
    assert result.metrics == {**last, "train_loss": wanted.losses[-1]}


def assert_state_equals(stored: dict[str, torch.Tensor], wanted: reference.Outcome) -> None:
    """The optimizer's state, and the buffers that the state dict leaves out.

    A block that is part of a tensor keeps its own `step`, as `weight/step/65536`; the plain
    optimizer has one for the whole tensor. A parameter that never had a gradient has no state; its
    place in the checkpoint holds zeros.
    """
    stored = {name: value for name, value in stored.items() if not name.startswith("lockstep.")}
    hidden = {name: value for name, value in wanted.buffers.items() if name not in wanted.model}
    assert_same_tensors({name: stored.pop(name) for name in hidden}, hidden, "buffers")
    wanted_state: dict[str, Any] = {}
    for name, found in stored.items():
        parameter, key, *_ = name.split("/")
        state = wanted.state[parameter]
        wanted_state[name] = state[key] if state else torch.zeros_like(found)
    assert_same_tensors(stored, wanted_state, "the optimizer's state")
    kept = {(name.split("/")[0], name.split("/")[1]) for name in stored}
    needed = {
        (p, key) for p, state in wanted.state.items() for key in state if state[key] is not None
    }
    assert needed <= kept


def assert_same_run(one: lockstep.Result, other: lockstep.Result) -> None:
    """Two runs that differ in their number of workers, and in nothing else."""
    assert other.fingerprint == one.fingerprint
    assert model_file(other) == model_file(one)
    assert ledger_file(other) == ledger_file(one)
    assert other.history == one.history
    assert other.metrics == one.metrics


# Tests.


@pytest.mark.parametrize("name", ZOO)
def test_equals_plain_pytorch(name: str, runs: Runs) -> None:
    one, _ = runs.get(name, default_workers(name))
    assert_equals_reference(one, expected(name))


@pytest.mark.parametrize("name", ZOO)
def test_same_bits_on_several_workers(name: str, runs: Runs) -> None:
    one, several = runs.get(name, default_workers(name))
    assert_same_run(one, several)


@pytest.mark.parametrize(("shards", "workers"), [(SHARDS, (1, 2, 3, 4, 5)), (12, (1, 5))])
def test_same_bits_on_any_number_of_workers(
    shards: int, workers: tuple[int, ...], runs: Runs
) -> None:
    """On the task with the most ways to go wrong: cut weights, missing gradients."""
    one, *others = runs.get("wide-branches", workers, shards)
    assert_equals_reference(one, expected("wide-branches", shards))
    for other in others:
        assert_same_run(one, other)


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "wide-clipped"])
def test_one_shard_is_the_plain_loop(name: str, runs: Runs) -> None:
    entry = TASKS[name]
    wanted = reference.train_unsharded(entry.task, **entry.settings())
    [result] = runs.get(name, [1], shards=1)
    assert model_file(result) == wanted.file()
    assert [float.fromhex(line["loss"]) for line in ledger_of(result)] == wanted.losses
    assert norms_of(result) == wanted.norms
    assert_state_equals(state_of(result), wanted)


@pytest.mark.parametrize("name", ["mlp", "by-epoch", "tied"])
def test_evaluation_counts_every_sample_once(name: str, runs: Runs) -> None:
    """31 samples in batches of 7: the last has 3, and workers get unequal numbers of them."""
    for result in runs.get(name, default_workers(name)):
        assert [item["step"] for item in result.history] == [5, 10, 12]
        for item in result.history:
            assert item["metrics"]["once"] == (2**HELD_OUT - 1) / HELD_OUT


def test_fewer_held_out_batches_than_workers(runs: Runs) -> None:
    settings = {"shards": SHARDS, "eval_batch_size": 20, "steps": 2}
    wanted = reference.train(TASKS["mlp"].task, **{**TASKS["mlp"].settings(), **settings})
    assert_equals_reference(runs.run("mlp", workers=4, **settings), wanted)


def test_loader_processes_change_nothing(runs: Runs) -> None:
    other = runs.run("augmented", workers=2, shards=SHARDS, loaders=2)
    assert_same_run(runs.get("augmented", [1])[0], other)


def test_the_result_holds_the_trained_model(runs: Runs) -> None:
    [result] = runs.get("tied", [1])
    wanted = expected("tied").model
    assert_same_tensors(dict(result.model().state_dict()), wanted, "the result's model")


@pytest.mark.parametrize("task", [MaxNorm("SGD", lr=0.5), Teacher()], ids=["max-norm", "teacher"])
def test_a_forward_pass_that_changes_parameters_is_refused(task: Task, run_folder: str) -> None:
    with pytest.raises(TaskError):
        lockstep.run(
            task, workers=2, shards=SHARDS, threads=1, batch_size=BATCH, steps=3, seed=0,
            out=run_folder, quiet=True,
        )  # fmt: skip


# The reference itself.


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_is_not_trivial(name: str) -> None:
    """Every parameter that has optimizer state has changed; no two steps have the same loss."""
    entry = TASKS[name]
    outcome = expected(name)
    reference.seed_all(entry.seed)
    for key, parameter in entry.task.model().named_parameters():
        if outcome.state.get(key) and parameter.numel():
            assert raw(parameter) != raw(outcome.model[key]), key
    assert any(outcome.state.values()) or name == "doubles"  # plain SGD keeps nothing
    assert len(set(outcome.losses)) == entry.steps


@pytest.mark.parametrize("name", ["mixture", "wide-branches"])
def test_some_gradients_are_missing(name: str) -> None:
    """The last branch is not taken in every step, so its state is behind; unused has none."""
    outcome = expected(name)
    assert not outcome.state["unused"]
    if name == "wide-branches":
        steps = [int(outcome.state[f"branches.{n}.weight"]["step"]) for n in range(3)]
        assert 0 < steps[2] < steps[0] == TASKS[name].steps


def test_other_settings_give_other_bits() -> None:
    """The comparisons can fail: seed, shards and batch size each change the reference."""
    entry = Entry(task=TASKS["transformer"].task, steps=3)
    settings = {"shards": SHARDS, **entry.settings()}
    changes: list[dict[str, Any]] = [{}, {"seed": 4}, {"shards": 5}, {"batch_size": 25}]
    files = {reference.train(entry.task, **{**settings, **change}).file() for change in changes}
    assert len(files) == 4


def test_one_shard_of_the_reference_is_the_plain_loop() -> None:
    """The reference's two halves agree, for every task; no run is needed for that."""
    for name in ZOO:
        settings = {**TASKS[name].settings(), "steps": 3}
        whole = reference.train(TASKS[name].task, shards=1, **settings)
        plain = reference.train_unsharded(TASKS[name].task, **settings)
        assert whole.file() == plain.file(), name
        assert whole.losses == plain.losses, name


# The long ones.


@pytest.mark.long
@pytest.mark.parametrize("shards", [SHARDS, 12])
@pytest.mark.parametrize("name", ZOO)
def test_cross_product(name: str, shards: int, runs: Runs) -> None:
    one, *others = runs.get(name, (1, 2, 3, 4, 5), shards)
    for other in others:
        assert_same_run(one, other)
    assert_equals_reference(one, expected(name, shards))


@pytest.mark.long
@pytest.mark.parametrize("name", MORE)
def test_more_tasks(name: str, runs: Runs) -> None:
    one, *others = runs.get(name, (1, 2, 3, 5))
    assert_equals_reference(one, expected(name))
    for other in others:
        assert_same_run(one, other)
