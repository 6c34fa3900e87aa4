"""The fused kernels called directly do to the byte what the optimizer's `step` does, or are not
called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lockstep
from lockstep.optim.direct_update import DirectUpdate

SIZES = ((7, 5), (5,), (64, 33), ())
Groups = list[dict[str, Any]]
Made = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def by(kind: str, **options: Any) -> Made:
    return lambda params: getattr(torch.optim, kind)(params, **{"fused": True, **options})


def two_groups(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups: Groups = [
        {"params": params[:1], "lr": 0.3},
        {"params": params[1:], "weight_decay": 0.1},
    ]
    return torch.optim.AdamW(groups, lr=0.01, fused=True)


def interleaved(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups: Groups = [{"params": params[::2], "momentum": 0.5}, {"params": params[1::2]}]
    return torch.optim.SGD(groups, lr=0.01, fused=True)


def two_optimizers(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return lockstep.Together(
        torch.optim.SGD(params[:2], lr=0.1, fused=True), torch.optim.Adam(params[2:], fused=True)
    )


CASES: dict[str, Made] = {
    "adam": by("Adam"),
    "adam amsgrad": by("Adam", amsgrad=True, weight_decay=0.1),
    "adam maximize": by("Adam", maximize=True, betas=(0.5, 0.9)),
    "adam tensor": by("Adam", lr=torch.tensor(0.03)),
    "adam decoupled": by("Adam", decoupled_weight_decay=True, weight_decay=0.1),
    "adamw": by("AdamW", eps=1e-3),
    "sgd": by("SGD", lr=0.1),
    "sgd momentum": by("SGD", lr=0.1, momentum=0.9, weight_decay=0.01),
    "sgd nesterov": by("SGD", lr=0.1, momentum=0.9, nesterov=True, maximize=True),
    "sgd dampened": by("SGD", lr=torch.tensor(0.1), momentum=0.9, dampening=0.3),
    "two groups": two_groups,
    "interleaved": interleaved,
    "two optimizers": two_optimizers,
}


class Twins:
    """Two equal optimizers over equal parameters, both of which have made two steps."""

    def __init__(self, made: Made) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(size)) for size in SIZES]
        self.optimizer = made(self.params)
        for _ in range(2):
            for param, gradient in zip(self.params, self.gradients(), strict=True):
                param.grad = gradient
            self.optimizer.step()
        self.other, self.others = copy.deepcopy((self.optimizer, self.params))

    @staticmethod
    def gradients() -> list[torch.Tensor]:
        return [torch.randn(size) for size in SIZES]

    def direct(self) -> DirectUpdate | None:
        """The direct update of the first one."""
        number = {
            id(param): number
            for number, group in enumerate(self.optimizer.param_groups)
            for param in group["params"]
        }
        return DirectUpdate.of(self.optimizer, [(number[id(p)], p) for p in self.params])

    def assert_equal(self) -> None:
        for param, other in zip(self.params, self.others, strict=True):
            assert torch.equal(param, other)
            state, wanted = self.optimizer.state[param], self.other.state[other]
            assert state.keys() == wanted.keys()
            for name in wanted:
                assert state[name] is None or torch.equal(state[name], wanted[name]), name


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_of_step(name: str) -> None:
    twins = Twins(CASES[name])
    direct = twins.direct()
    assert direct is not None
    for number in range(5):
        for optimizer in (twins.optimizer, twins.other):  # as a schedule does
            for group in optimizer.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(0.1 / (1 + number))
                else:
                    group["lr"] = 0.1 / (1 + number)
                if group.get("momentum"):
                    group["momentum"] = 0.8 + number / 100
        gradients = twins.gradients()
        kept = [gradient.clone() for gradient in gradients]
        assert direct.run(gradients)
        assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))
        for param, gradient in zip(twins.others, gradients, strict=True):
            param.grad = gradient
        twins.other.step()
        twins.assert_equal()


class Doubles(torch.optim.SGD):
    """A subclass, which may do anything."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


NOT_THESE: dict[str, Made] = {
    "not fused": by("Adam", fused=False),
    "foreach": by("SGD", lr=0.1, fused=False, foreach=True),
    "another class": by("Adagrad"),
    "a subclass": lambda params: Doubles(params, lr=0.1, fused=True),
    "betas": by("Adam", betas=(torch.tensor(0.9), torch.tensor(0.9)), lr=torch.tensor(0.1)),
}


@pytest.mark.parametrize("name", NOT_THESE)
def test_what_is_not_known_is_left_to_step(name: str) -> None:
    assert Twins(NOT_THESE[name]).direct() is None


def test_a_class_whose_step_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(CASES["sgd"])
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: None)
    assert twins.direct() is None


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("adam", "fused", False), ("adam", "amsgrad", True), ("sgd", "momentum", 0.9)],
)
def test_an_option_changes_on_the_way(name: str, option: str, value: object) -> None:
    twins = Twins(CASES[name])
    direct = twins.direct()
    assert direct is not None
    twins.optimizer.param_groups[0][option] = value
    assert not direct.run(twins.gradients())
    twins.assert_equal()


def test_a_gradient_is_missing() -> None:
    twins = Twins(CASES["adam"])
    direct = twins.direct()
    assert direct is not None
    assert not direct.run([None, *twins.gradients()[1:]])
    twins.assert_equal()
