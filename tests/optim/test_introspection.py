"""Optimizers and schedules whose bits would depend on the number of workers are refused.

Each is examined in this process; nothing is started.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, ReduceLROnPlateau

from lockstep.errors import LockstepError, OptimizerError, TaskError
from lockstep.job.task import Parameters
from lockstep.optim.chained import Together
from lockstep.optim.introspection import check_known, discover_state
from lockstep.optim.known_optimizers import rule_of
from lockstep.optim.lr_schedule import LrSchedule
from lockstep.optim.undivided_trial import try_undivided
from lockstep.planning.sampling import Sampling
from lockstep.state import shared_state as state
from lockstep.worker import build_state as building
from tests.zoo.parameters import Lookahead
from tests.zoo.vectors import Vectors


def message(error: pytest.ExceptionInfo[LockstepError]) -> str:
    assert error.value.expected
    assert error.value.found
    assert error.value.fix
    return str(error.value)


# Optimizers that are not PyTorch's.


class Own(torch.optim.Optimizer):
    """SGD. Each subclass has a `factor` that it should not have."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        self.calls = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in given:
            parameter.sub_(parameter.grad * self.factor(parameter, given))

    def factor(self, parameter: torch.Tensor, given: list[torch.Tensor]) -> Any:
        raise NotImplementedError


class Counts(Own):
    def factor(self, parameter: torch.Tensor, given: list[torch.Tensor]) -> Any:
        self.calls += 1
        return 0.1


class CountsInState(Own):
    def factor(self, parameter: torch.Tensor, given: list[torch.Tensor]) -> Any:
        self.state["all"]["calls"] = 1  # type: ignore[index]
        return 0.1


class CountsInGroup(Own):
    def factor(self, parameter: torch.Tensor, given: list[torch.Tensor]) -> Any:
        self.param_groups[0]["calls"] = self.param_groups[0].get("calls", 0) + 1
        return 0.1


class LimitsTheNorm(Own):
    def factor(self, parameter: torch.Tensor, given: list[torch.Tensor]) -> Any:
        return 1 / (1 + sum(torch.linalg.vector_norm(p.grad) for p in given if p.grad is not None))


class SaysPerTensor(LimitsTheNorm):
    lockstep_update = "per_tensor"


class SaysNonsense(LimitsTheNorm):
    lockstep_update = "by_row"


class DrawsTorch(Own):
    def factor(self, parameter: torch.Tensor, given: list[torch.Tensor]) -> Any:
        return torch.rand(())


class DrawsPython(Own):
    def factor(self, parameter: torch.Tensor, given: list[torch.Tensor]) -> Any:
        return random.random()


class DrawsNumPy(Own):
    def factor(self, parameter: torch.Tensor, given: list[torch.Tensor]) -> Any:
        return float(np.random.rand())


class Fails(Own):
    def factor(self, parameter: torch.Tensor, given: list[torch.Tensor]) -> Any:
        raise TypeError("a mistake of its own")


class With(Vectors):
    """Any optimizer, any schedule."""

    def __init__(self, kind: Callable[[Any], Any], schedule: Callable[[Any], Any] | None = None):
        self.kind, self.make = kind, schedule

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = self.kind(params)
        return made

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        return self.make(optimizer) if self.make else None


def build(task: With) -> state.SharedState:
    return building.build(task, task.model(), shards=2, max_workers=1, clip=False)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (CountsInState, "changed by step(): state['all']"),
        (SaysPerTensor, "in another way when there are others"),
        (SaysNonsense, "declares an unknown lockstep_update"),
        (DrawsTorch, "draws random numbers"),
        (DrawsPython, "draws random numbers"),
        (DrawsNumPy, "draws random numbers"),
        (torch.optim.SparseAdam, "SparseAdam does not support dense gradients"),
        (lambda p: torch.optim.Adam(p, capturable=True), "must be on supported devices"),
    ],
)
def test_an_optimizer_that_owners_cannot_run(kind: Callable[[Any], Any], says: str) -> None:
    with pytest.raises(OptimizerError) as error:
        build(With(kind))
    assert says in message(error)


@pytest.mark.parametrize("kind", [Counts, CountsInGroup, LimitsTheNorm])
def test_what_is_of_all_parameters_is_kept_for_one_owner(kind: Callable[[Any], Any]) -> None:
    task = With(kind)
    named = list(task.model().named_parameters())
    optimizer = task.optimizer(Parameters(named))
    assert rule_of(optimizer) == "together"
    kept = try_undivided(optimizer, named, [])
    assert ("self", "calls") in kept.remembered


def test_a_subclass_is_not_known_by_its_base() -> None:
    class Sub(torch.optim.AdamW):
        pass

    parameter = nn.Parameter(torch.zeros(3))
    assert rule_of(torch.optim.AdamW([parameter])) == "elementwise"
    assert rule_of(torch.optim.Muon([nn.Parameter(torch.zeros(3, 3))])) == "per_tensor"
    assert rule_of(Sub([parameter])) == "together"
    both = Together(torch.optim.SGD([parameter]), Sub([nn.Parameter(torch.zeros(3))]))
    assert rule_of(both) == "together"
    hooked = torch.optim.SGD([parameter])
    hooked.register_step_pre_hook(lambda *_: None)
    assert rule_of(hooked) == "together"


def test_a_mistake_in_an_optimizer_is_shown_as_it_is() -> None:
    with pytest.raises(TypeError, match="a mistake of its own"):
        build(With(Fails))


def test_state_that_comes_late_is_refused() -> None:
    """`Lookahead` may replace its state at some steps only, so it is looked at after each."""
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = Lookahead([parameter], lr=0.1)
    stand_in = nn.Parameter(torch.zeros(3))
    keys = discover_state(optimizer, 0, stand_in, {}, sparse=False)
    assert {key.name: key.rebound for key in keys} == {"count": True, "slow": True}
    check_known(optimizer, {"count": 1, "slow": parameter}, keys)
    with pytest.raises(OptimizerError, match="begins to keep state after its second step") as error:
        check_known(optimizer, {"count": 1, "slow": parameter, "late": 1}, keys)
    assert "state['late']" in message(error)


# Schedules.


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (ReduceLROnPlateau, "a schedule that waits for a metric cannot be used here"),
        (lambda optimizer: [ConstantLR(optimizer)], "did not return a scheduler"),
    ],
    ids=["plateau", "list"],
)
def test_a_schedule_that_cannot_be_stepped_is_refused(
    schedule: Callable[[Any], Any], says: str
) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    task = With(lambda _: optimizer, schedule)
    sampling = Sampling(samples=8, batch_size=4, shards=1, seed=0)
    with pytest.raises(TaskError) as error:
        LrSchedule(task, optimizer, sampling, waits=False)  # as within rounds of local steps
    assert says in message(error)
