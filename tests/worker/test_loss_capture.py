"""Which losses become graphs, and when a graph no longer stands for its loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lockstep.worker.loss_capture import UntraceableError, capture
from tests.zoo.vectors import CLASSES, FEATURES, Vectors, normal, whole

SCALE = 1.0


def batch(size: int = 5) -> list[torch.Tensor]:
    return [normal(size, FEATURES), whole(CLASSES, size)]


class Plain(Vectors):
    """Has everything that a graph may depend on: a constant, a mode, an attribute."""

    smooth = 0.0
    held: torch.Tensor | None = None

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        outputs = model(batch[0]) * SCALE
        if not model.training:
            outputs = outputs / 2
        return functional.cross_entropy(outputs, batch[1], label_smoothing=self.smooth)


def test_the_graph_gives_the_loss() -> None:
    task = Plain()
    model, given = task.model(), batch()
    captured = capture(task, model, given)
    assert captured.holds(task, model, given)
    again = batch()
    assert captured.holds(task, model, again)
    tensors = {id(old): new for old, new in zip(given, again, strict=True)}
    (found,) = captured.graph(*(tensors.get(id(each), each) for each in captured.inputs))
    assert torch.equal(found, task.loss(model, again))
    known = [*model.parameters(), *given]
    assert all(any(each is other for other in known) for each in captured.inputs)


def set_mode(task: Plain, model: nn.Module) -> None:
    model.eval()


def set_attribute(task: Plain, model: nn.Module) -> None:
    task.smooth = 0.1


def replace_a_module(task: Plain, model: nn.Module) -> None:
    model[1] = nn.ReLU()  # type: ignore[operator]


def freeze(task: Plain, model: nn.Module) -> None:
    next(model.parameters()).requires_grad_(False)


def add_a_hook(task: Plain, model: nn.Module) -> None:
    next(model.children()).register_forward_hook(lambda module, given, made: made * 2)


def patch_a_forward(task: Plain, model: nn.Module) -> None:
    module = next(model.children())
    module.forward = lambda x: nn.Linear.forward(module, x) * 2  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change", [set_mode, set_attribute, replace_a_module, freeze, add_a_hook, patch_a_forward]
)
def test_the_guard_meets_a_change(change: Callable[[Plain, nn.Module], None]) -> None:
    task = Plain()
    model = task.model()
    captured = capture(task, model, batch())
    change(task, model)
    assert not captured.holds(task, model, batch())


def test_the_guard_meets_a_changed_global(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Plain()
    model = task.model()
    captured = capture(task, model, batch())
    assert captured.holds(task, model, batch())
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert not captured.holds(task, model, batch())


@pytest.mark.parametrize(
    "other",
    [
        lambda: batch(4),
        lambda: batch()[:1],
        lambda: tuple(batch()),
        lambda: [batch()[0].double(), batch()[1]],
        lambda: [batch()[0].requires_grad_(), batch()[1]],
        lambda: [normal(FEATURES, 5).t(), batch()[1]],
    ],
    ids=["fewer", "short", "tuple", "type", "grad", "strides"],
)
def test_the_guard_meets_batches_of_another_form(other: Callable[[], Any]) -> None:
    task = Plain()
    model = task.model()
    captured = capture(task, model, batch())
    assert not captured.holds(task, model, other())


class Counts(Plain):
    calls = 0

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.calls += 1
        return super().loss(model, batch) * self.calls


class Appends(Plain):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        self.seen.append(1)
        return super().loss(model, batch)


class Rolls(Plain):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) * random.random()


class Chance(Plain):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        factor = 3.0 if np.random.rand() < 0.01 else 1.0
        return super().loss(model, batch) * factor


class LooksAtValues(Plain):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        loss = super().loss(model, batch)
        return loss * 2 if loss.item() > 100 else loss


class Holds(Plain):
    def __init__(self) -> None:
        self.weights = torch.ones(CLASSES)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], self.weights)


class Prints(Plain):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        print("computing")
        return super().loss(model, batch)


class Two(Plain):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(
    "kind", [Counts, Appends, Rolls, Chance, LooksAtValues, Holds, Prints, Two]
)
def test_what_is_no_graph_is_left_to_the_plain_pass(kind: type[Plain]) -> None:
    task = kind()
    with pytest.raises(UntraceableError):
        capture(task, task.model(), batch())
