"""Which parameters an optimizer lets be cut, and the optimizer over their slices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lockstep.job.task import Parameters, Task
from lockstep.optim.chained import Together
from lockstep.optim.sliced_parameters import Sliced, slice_parameters

WIDTH = 64


class Own(torch.optim.SGD):
    """Anything may happen in it."""


def made(optimizer: Any, task: Task | None = None) -> tuple[Any, Any, Sliced]:
    model: Any = nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
    )
    built = optimizer(Parameters(model.named_parameters()))
    return model, built, slice_parameters(task or Task(), model, built, 2, None)


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (lambda params: torch.optim.Adafactor(params), "Adafactor updates it as a whole"),
        (lambda params: Own(params, lr=0.1), "Own is not known to update elements one by one"),
        (
            lambda params: Together(torch.optim.Muon([params[0]]), torch.optim.Adam(params[1:])),
            "Muon updates it as a whole",
        ),
    ],
)
def test_what_an_optimizer_updates_as_a_whole_stays_whole(optimizer: Any, reason: str) -> None:
    model, _, found = made(optimizer)
    assert found.cuts[0]["cut"] is None
    assert reason in found.cuts[0]["reason"]
    assert type(model[0]) is nn.Linear
    assert bool(found.joined) == ("Muon" in reason)


def test_groups_are_made_from_plain_names_and_then_have_the_slices() -> None:
    def build(params: Parameters) -> torch.optim.Optimizer:
        named: dict[str, Any] = dict(params.named())
        first = named.pop("0.weight")
        groups: list[dict[str, Any]] = [
            {"params": [first], "lr": 0.5}, {"params": [*named.values()]}
        ]  # fmt: skip
        return torch.optim.AdamW(groups)

    model, optimizer, _ = made(build)
    assert optimizer.param_groups[0]["params"] == [part.weight for part in model[0].slices]
    everything = [each for group in optimizer.param_groups for each in group["params"]]
    assert {id(each) for each in everything} == {id(each) for each in model.parameters()}


def test_the_state_of_the_constructor_is_cut_too() -> None:
    model, optimizer, _ = made(lambda params: torch.optim.Adagrad(params, lr=0.1))
    for parameter in model.parameters():
        assert optimizer.state[parameter]["sum"].shape == parameter.shape
    assert len(optimizer.state) == len(list(model.parameters()))


def test_steps_are_those_of_whole_parameters() -> None:
    def build(params: Parameters) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=0.1)

    model, optimizer, _ = made(build)
    plain = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        plain.weight.copy_(model[0].weight)
    whole = torch.optim.Adam([plain.weight], lr=0.1)
    gradient = torch.randn(WIDTH, WIDTH)
    for part, cut in zip(model[0].slices, gradient.chunk(2), strict=True):
        part.weight.grad = cut.clone()
    plain.weight.grad = gradient
    optimizer.step(), whole.step()
    assert torch.equal(model[0].weight, plain.weight)


class Holding(Task):
    """Holds a parameter outside of its module."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.built: Any = None


def test_what_something_else_holds_stays_whole() -> None:
    task = Holding()

    def build(params: Parameters) -> torch.optim.Optimizer:
        task.held.append(params[0])
        task.built = adam = torch.optim.Adam(params)  # an optimizer gets the slices
        return adam

    model, _, found = made(build, task)
    assert [cut["cut"] for cut in found.cuts] == [None, "column"]
    assert "holds it, too" in found.cuts[0]["reason"]
    assert task.held[0] is model[0].weight


def test_frozen_parameters_are_cut_and_stay_frozen() -> None:
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[0].requires_grad_(False)
    state = torch.get_rng_state()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    plain = copy.deepcopy(model)
    slice_parameters(Task(), model, optimizer, 4, None)
    assert not any(parameter.requires_grad for parameter in model[0].parameters())
    assert all(parameter.requires_grad for parameter in model[1].parameters())
    assert torch.equal(torch.get_rng_state(), state)  # cutting draws nothing
    assert torch.equal(model[0].weight, plain[0].weight)
