"""Compiled jobs: other bits than plain PyTorch's, the same for any number of workers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import lockstep
from lockstep.errors import RefusedError, TaskError
from lockstep.job.faults import Fault
from lockstep.system.folders import user_cache
from tests.support.harmed_runs import assert_same, assert_struck, events, yard
from tests.support.multi_host_runs import Site, ended_well, site
from tests.zoo import ZOO
from tests.zoo.vectors import CLASSES, FEATURES, Vectors, normal, whole

__all__ = ["site", "yard"]  # fixtures

COMPILED: dict[str, Any] = {
    "steps": 10, "batch_size": 26, "seed": 3, "shards": 4, "compile": True, "quiet": True,
}  # fmt: skip


class Net(Vectors):
    """Dropout and a norm; with batches of 26, shards have 6 or 7 samples, in the end 1 or 2."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 16), nn.LayerNorm(16), nn.GELU(), nn.Dropout(0.3),
            nn.Linear(16, CLASSES),
        )  # fmt: skip


class Pictures(Vectors):
    """Convolutions with the running averages of BatchNorm."""

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(normal(64, 3, 8, 8), whole(CLASSES, 64))

    def eval_data(self) -> Dataset[Any] | None:
        return None

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * 36, CLASSES),
        )  # fmt: skip


TASKS: dict[str, Vectors] = {"net": Net(), "pictures": Pictures()}


@pytest.fixture
def kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for this session's machine code: what a test finds does not depend on earlier ones'
    failures."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))


@pytest.mark.long
@pytest.mark.parametrize("name", TASKS)
def test_one_fingerprint_for_any_number_of_workers(
    name: str, kernels: None, tmp_path: Path
) -> None:
    task, prints = TASKS[name], set()
    for workers in (1, 3):
        result = lockstep.run(task, workers=workers, out=str(tmp_path / str(workers)), **COMPILED)
        prints.add(result.fingerprint)
    fault = Fault(worker_id=1, step=5, phase="update_begin")
    harmed = lockstep.run(
        task, workers=2, out=str(tmp_path / "harmed"), faults=(fault,), **COMPILED
    )
    assert_struck(harmed.folder, [fault])
    assert prints == {harmed.fingerprint}
    plain = lockstep.run(
        task, workers=1, out=str(tmp_path / "plain"), **{**COMPILED, "compile": False}
    )
    pairs = zip(plain.model().parameters(), harmed.model().parameters(), strict=True)
    if name == "pictures":  # nothing is drawn: the same up to rounding
        assert all(torch.allclose(one, other, atol=1e-3) for one, other in pairs)
    verified = lockstep.verify(harmed.folder, task=task, quiet=True)
    assert verified.final


@pytest.mark.long
def test_several_hosts(kernels: None, site: Site) -> None:
    """A worker dies on one; the bits are those of one host, whose manifest names the compiler."""
    fault = Fault(worker_id=0, step=3, phase="backward")
    on = site.agents({"b": 2}, 1)
    found = site.run("mlp", on, compile=True, faults=(fault,))
    assert_struck(found.folder, [fault])
    assert_same(found, site.alone("mlp", compile=True))
    ended_well(on)


@pytest.mark.long
def test_a_host_without_a_compiler_is_refused(
    kernels: None, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = site.agents({"b": 1}, 1)
    bare = partial(on.start, environment={"CXX": "/nowhere/g++", "PATH": "/nowhere"})
    monkeypatch.setattr(on, "start", bare)
    with pytest.raises(RefusedError, match="host b") as raised:
        site.run("mlp", on, compile=True)
    assert "compiler is none" in raised.value.found


@pytest.mark.long
def test_a_run_that_is_killed_while_it_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What it has left of its machine code is not taken for whole."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = user_cache() / "kernels"
    lockstep.run(Net(), workers=1, out=str(tmp_path / "first"), **COMPILED)
    kept = {path.name: path for path in folder.iterdir()}
    assert kept
    for name, path in kept.items():
        assert "." not in name
        path.rename(folder / f"{name}.killed")
        for code in (folder / f"{name}.killed").rglob("*.so"):
            code.write_bytes(b"")
    lockstep.run(Net(), workers=1, out=str(tmp_path / "second"), **COMPILED)
    assert kept.keys() <= {path.name for path in folder.iterdir()}


class OneRow(Vectors):
    """A loss of type float64, of one row."""

    def eval_data(self) -> Dataset[Any] | None:
        return None

    def model(self) -> nn.Module:
        return super().model().double()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0].double()), batch[1]).reshape(1)


@pytest.mark.long
def test_a_loss_of_another_form(kernels: None, run_folder: str) -> None:
    result = lockstep.run(OneRow(), workers=2, out=run_folder, **COMPILED)
    assert result.metrics["train_loss"] < 2


@pytest.mark.long
def test_it_is_recorded(kernels: None, tmp_path: Path) -> None:
    result = lockstep.run(Net(), workers=1, out=str(tmp_path / "run"), **COMPILED)
    manifest = Path(result.folder, "manifest.json").read_text()
    assert '"compiler": "' in manifest
    assert '"vectors": "avx' in manifest
    assert events(result.folder, "traced") == []


class LooksAtItself(Vectors):
    """The loss depends on what changes from step to step."""

    def set_position(self, position: Any) -> None:
        self.at = position.step


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "lstm": (ZOO["lstm"].task, {}, "RNN"),
    "branches": (ZOO["mixture"].task, {}, "Data-dependent"),
    "threads": (Net(), {"threads": 2}, "more than one thread"),
    "autocast": (Net(), {"precision": "bf16"}, "autocast"),
    "position": (LooksAtItself(), {}, "position"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compiled_is_refused(name: str, run_folder: str) -> None:
    task, settings, why = REFUSED[name]
    with pytest.raises(TaskError, match="the loss cannot be compiled") as error:
        lockstep.run(task, workers=1, out=run_folder, **{**COMPILED, **settings})
    assert why in error.value.found
    assert "leave compile out" in error.value.fix


@pytest.mark.long
def test_samples_that_are_augmented(kernels: None, tmp_path: Path) -> None:
    task = ZOO["augmented"].task
    prints = {
        lockstep.run(task, workers=w, out=str(tmp_path / str(w)), **COMPILED).fingerprint
        for w in (1, 2)
    }
    assert len(prints) == 1


@pytest.mark.long
def test_without_a_compiler(
    kernels: None, monkeypatch: pytest.MonkeyPatch, run_folder: str
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("XDG_CACHE_HOME", run_folder + "-cache")
    with pytest.raises(TaskError, match="the loss cannot be compiled"):
        lockstep.run(Net(), workers=1, out=run_folder, **COMPILED)
