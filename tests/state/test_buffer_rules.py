"""Buffer rules: what is declared, what is known, and what may not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as parametrized

from lockstep.errors import TaskError
from lockstep.job.task import Task
from lockstep.state.buffer_rules import BufferWatch, rules_of, same_bytes


class Declared(Task):
    def __init__(self, rules: Any = None) -> None:
        self.rules = {} if rules is None else rules

    def buffer_rules(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.rules
        return found


def named(model: nn.Module, task: Task | None = None) -> dict[str, str | None]:
    names = [name for name, _ in model.named_buffers()]
    return dict(zip(names, rules_of(task or Task(), model), strict=True))


class Inherits(nn.BatchNorm1d):
    """With the very forward pass of torch's class."""


class Overrides(nn.BatchNorm1d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.running_mean is not None:
            self.running_mean += x.sum(0)
        return x


class Counts(nn.Module):
    buffer_rules: ClassVar[Any] = {"seen": "sum", "inner.*": "last"}

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("other", torch.zeros(2))
        self.inner = nn.BatchNorm1d(2)


AVERAGES = {"running_mean": "mean", "running_var": "mean", "num_batches_tracked": "max"}


@pytest.mark.parametrize(
    "kind",
    [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, Inherits],
)
def test_batch_norm_is_known(kind: type[nn.Module]) -> None:
    assert named(kind(3)) == AVERAGES


@pytest.mark.parametrize("kind", [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d])
def test_instance_norm_is_known(kind: type[nn.Module]) -> None:
    assert named(kind(3, track_running_stats=True)) == AVERAGES


def test_a_forward_pass_of_ones_own_is_not_known() -> None:
    assert set(named(Overrides(3)).values()) == {None}


def test_spectral_norm_is_known() -> None:
    assert named(spectral_norm(nn.Linear(3, 3))) == {"weight_u": "last", "weight_v": "last"}
    assert set(named(parametrized(nn.Linear(3, 3))).values()) == {"last"}


def test_observers_are_known() -> None:
    from torch.ao.quantization import FakeQuantize, MinMaxObserver, MovingAverageMinMaxObserver

    rules = named(MinMaxObserver())
    assert (rules["min_val"], rules["max_val"]) == ("min", "max")
    rules = named(FakeQuantize(observer=MovingAverageMinMaxObserver))
    assert (rules["scale"], rules["zero_point"]) == ("last", "last")
    assert rules["activation_post_process.min_val"] == "mean"
    assert rules["fake_quant_enabled"] is None


def test_the_task_comes_first_then_the_module_then_what_is_known() -> None:
    model = nn.Sequential(Counts())
    assert named(model) == {
        "0.seen": "sum", "0.other": None, "0.inner.running_mean": "last",
        "0.inner.running_var": "last", "0.inner.num_batches_tracked": "last",
    }  # fmt: skip
    found = named(model, Declared({"*.seen": "max", "*.inner.running_*": "mean"}))
    assert found["0.seen"] == "max"
    assert found["0.inner.running_var"] == "mean"
    assert found["0.inner.num_batches_tracked"] == "last"


@pytest.mark.parametrize("rules", [{"seen": "average"}, {"seen": None}, ["seen"], {1: "sum"}])
def test_what_is_no_rule_is_refused(rules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError, match=r"Declared\.buffer_rules\(\) does not give rules"):
        rules_of(Declared(rules), nn.BatchNorm1d(2))
    monkeypatch.setattr(Counts, "buffer_rules", rules)
    with pytest.raises(TaskError, match=r"Counts\.buffer_rules does not give rules"):
        rules_of(Task(), Counts())


def left(model: nn.Module) -> list[torch.Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def test_a_buffer_without_a_rule_may_not_change_where_there_are_shards() -> None:
    model, committed = Counts(), left(Counts())
    rules = rules_of(Task(), model)
    changed = left(model)
    changed[0] += 3
    watch = BufferWatch(model, committed, rules, 2)
    watch.check(changed, 7)
    changed[1][1] = -0.0  # equal, but other bytes
    with pytest.raises(TaskError, match=r"changed buffer other, .* 2 shards") as error:
        watch.check(changed, 7)
    assert "it changed at step 7" in str(error.value.found)
    BufferWatch(model, committed, rules, 1).check(changed, 7)


@pytest.mark.parametrize(
    ("dtype", "rule"),
    [
        (torch.bool, "sum"), (torch.int64, "mean"), (torch.complex64, "max"),
        (torch.uint16, "sum"), (torch.float8_e5m2, "max"),
    ],
)  # fmt: skip
def test_a_rule_that_a_type_does_not_have(dtype: torch.dtype, rule: Any) -> None:
    model = nn.Module()
    model.register_buffer("odd", torch.zeros(3).to(dtype))
    watch = BufferWatch(model, left(model), [rule], 2)
    watch.check(left(model), 0)  # it does not change
    with pytest.raises(TaskError, match=f"the rule of buffer odd is {rule}"):
        watch.check([torch.ones(3).to(dtype)], 0)


def test_same_bytes() -> None:
    nan = torch.tensor([torch.nan, 1.0])
    assert same_bytes(nan, nan.clone())
    assert same_bytes(torch.zeros(0), torch.zeros(0))
    assert same_bytes(torch.eye(3).t(), torch.eye(3))
    assert not same_bytes(torch.zeros(()), -torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.complex64, torch.complex128])
def test_same_bytes_of_every_size(dtype: torch.dtype) -> None:
    one = torch.ones(3, 2, dtype=dtype)
    assert same_bytes(one, one.clone())
    other = one.clone()
    other[2, 1] = 0
    assert not same_bytes(one, other)
