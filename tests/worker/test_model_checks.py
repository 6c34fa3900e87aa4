"""Models whose bits would depend on the number of workers are refused.

Each is examined in this process; nothing is started.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lockstep.collectives.tree_sum import combine_buffers
from lockstep.errors import LockstepError, TaskError
from lockstep.worker.model_checks import check_model, held_tensors
from tests.zoo.buffers import Counted, Viewed
from tests.zoo.parameters import Complex, Odd
from tests.zoo.vectors import Vectors


def message(error: pytest.ExceptionInfo[LockstepError]) -> str:
    assert error.value.expected
    assert error.value.found
    assert error.value.fix
    return str(error.value)


class TiedData(nn.Module):
    """Two parameters over the same memory: plain PyTorch updates it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight.data = self.a.weight.data.t()


class WeightInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.register_buffer("copy", self.a.weight.data[1:])


class Interleaved(nn.Module):
    """Two parameters in the same memory that have nothing in common."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.zeros(4, 6)
        self.left, self.right = nn.Parameter(both[:, :3]), nn.Parameter(both[:, 3:])


class Extra(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}


def with_buffer(value: torch.Tensor) -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("table", value)
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: None, "Task.model did not return a module"),
        (lambda: nn.LazyLinear(2), "parameter weight has no shape yet"),
        (lambda: nn.Linear(2, 2, device="meta"), "parameter weight is not in main memory"),
        (lambda: with_buffer(torch.eye(2).to_sparse()), "buffer table is sparse"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex128), "weight has a type that cannot be"),
        (TiedData, "a.weight and b.weight share memory"),
        (WeightInABuffer, "a.weight and copy share memory"),
        (lambda: Extra(2, 2), "state dict has _extra_state"),
    ],
    ids=["none", "lazy", "meta", "sparse", "complex128", "tied", "in-buffer", "extra"],
)
def test_a_model_that_cannot_be_shared_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(TaskError) as error:
        check_model(make())
    assert says in message(error)


@pytest.mark.parametrize("make", [Interleaved, Counted, Viewed, Odd, Complex])
def test_an_odd_model_is_taken(make: Callable[[], nn.Module]) -> None:
    check_model(make())


def test_a_buffer_of_a_type_without_sums_may_not_change() -> None:
    table = torch.tensor(3, dtype=torch.uint16)
    combine_buffers(table, [table.clone(), table.clone()], (0.5, 0.5), "max")
    with pytest.raises(TaskError, match=r"changed a buffer of torch\.uint16"):
        combine_buffers(table, [table.clone(), torch.zeros_like(table)], (0.5, 0.5), "max")


def test_what_the_task_holds_is_known() -> None:
    task, model = Vectors(), nn.Linear(2, 2)
    task.teacher, task.same, task.centre = nn.BatchNorm1d(2), model, torch.zeros(2)  # type: ignore[attr-defined]
    names = [name for name, _ in held_tensors(task, model)]
    assert "self.teacher.running_mean" in names
    assert "self.centre" in names
    assert not any(name.startswith("self.same") for name in names)
