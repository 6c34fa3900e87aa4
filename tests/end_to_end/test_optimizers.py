"""Invariant 1 for optimizers: plain PyTorch's bits for one shard, the same ones for any W.

Every class of `torch.optim` that needs no closure, and optimizers of others that look at all
tensors together: above a threshold, after a warm-up, or at a matrix of a certain size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import lockstep
from lockstep.errors import OptimizerError
from lockstep.job.faults import Fault
from tests.support import reference_loop as reference
from tests.zoo import optimizers as own
from tests.zoo.vectors import By, Matrices, Scheduled, Vectors

SETTINGS: dict[str, Any] = {"batch_size": 26, "steps": 8, "seed": 3}

TORCHS: dict[str, Vectors] = {
    kind: By(kind, lr=0.01)
    for kind in (
        "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop",
        "Rprop", "SGD", "Adafactor",
    )
}  # fmt: skip
TORCHS["AdamW fused"] = By("AdamW", lr=0.01, fused=True, amsgrad=True)
TORCHS["SGD fused"] = Scheduled("SGD", lr=0.01, momentum=0.9, nesterov=True, fused=True)
TORCHS["Muon"] = Matrices("Muon", lr=0.01)
OTHERS: dict[str, Vectors] = {
    "clips": own.WithOwn(own.Clips, lr=0.1),
    "skips": own.RootOfNegative(own.SkipsNonFinite, lr=0.1),
    "distance": own.WithOwn(own.Distance),
    "lamb": own.WideWithOwn(own.Lamb),
    "muon-floor": own.WideWithOwn(own.MuonFloor),
    "galore": own.WithOwn(own.GaLore),
    "soap": own.WithOwn(own.Soap),
    "per-tensor": own.WideWithOwn(own.SaysPerTensor),
    "elementwise": own.WideWithOwn(own.SaysElementwise),
}
ALL = {**TORCHS, **OTHERS}

SHORT = {"AdamW fused", "SGD", "Adafactor", "Muon", "clips", "lamb", "soap", "per-tensor"}
"""One of each kind; the others are among the long tests."""
NAMES = [n if n in SHORT else pytest.param(n, marks=pytest.mark.long) for n in ALL]

Run = Callable[..., tuple[str, bytes, list[str]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a task; returns the fingerprint, the model's file and the ledger's losses."""
    folder, numbers = tmp_path_factory.mktemp("optimizers"), itertools.count()

    def made(task: Vectors, **settings: Any) -> tuple[str, bytes, list[str]]:
        out = folder / str(next(numbers))
        result = lockstep.run(
            task, threads=1, evaluate=False, out=str(out), quiet=True, **{**SETTINGS, **settings}
        )
        ledger = [line for line in (out / "ledger.jsonl").read_text().splitlines() if line]
        return result.fingerprint, (out / "model.safetensors").read_bytes(), ledger

    with lockstep.preloaded():
        yield made


@pytest.mark.parametrize("name", ALL)
def test_one_shard_is_the_plain_loop(name: str, run: Run) -> None:
    wanted = reference.train_unsharded(ALL[name], **SETTINGS)
    _, model, _ = run(ALL[name], workers=1, shards=1)
    assert model == wanted.file()


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_workers_is_the_reference(name: str, run: Run) -> None:
    wanted = reference.train(ALL[name], shards=6, **SETTINGS)
    counts = (1, 2, 3) if name in OTHERS else (1, 3)
    first, *others = [run(ALL[name], workers=count, shards=6) for count in counts]
    assert first[1] == wanted.file()
    for other in others:
        assert other == first


def test_what_an_optimizer_remembers_survives_its_worker(run: Run) -> None:
    """The distance, a count and a tensor are of no parameter: the next owner needs them."""
    task = OTHERS["distance"]
    whole = run(task, workers=2, shards=6)
    for phase in ("update_begin", "update_end", "commit"):
        fault = Fault(worker_id=0, step=5, phase=phase)
        assert run(task, workers=2, shards=6, faults=(fault,))[:2] == whole[:2]


def test_a_schedule_beside_an_optimizer_that_is_not_known(run: Run) -> None:
    class Task(Scheduled):
        def optimizer(self, params: Any) -> torch.optim.Optimizer:
            return own.Clips(params, lr=0.01, momentum=0.9)

    task = Task("SGD")
    wanted = reference.train(task, shards=6, **SETTINGS)
    found = [run(task, workers=count, shards=6) for count in (1, 2)]
    assert found[0] == found[1]
    assert found[0][1] == wanted.file()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (own.RemembersNorms, "changed by step(): self.norms"),
        (own.Wraps, "changed by step(): self.base"),
        (own.DrawsLater, "draws random numbers"),
        (torch.optim.LBFGS, "whose step() needs no closure"),
    ],
)
def test_what_cannot_be_kept_is_refused(kind: Any, says: str, run: Run) -> None:
    class Task(Vectors):
        def optimizer(self, params: Any) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = kind(params)
            return made

    for workers in (1, 2):
        with pytest.raises(OptimizerError, match="next:") as error:
            run(Task(), workers=workers, shards=2)
        assert says in str(error.value)


def test_hosts_cannot_divide_what_one_worker_updates(run: Run) -> None:
    with pytest.raises(OptimizerError, match="Clips is not known to update tensors one by one"):
        run(OTHERS["clips"], workers=1, shards=2, ownership="sharded")
