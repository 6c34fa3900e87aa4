"""Direct calls: the same operations, called with less Python around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lockstep.worker import direct_calls
from lockstep.worker.direct_calls import call_directly, take_out_views

aten = torch.ops.aten


class Ran(TorchDispatchMode):
    """Which operations were run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def ran(traced: fx.GraphModule, *inputs: Any) -> tuple[list[str], Any]:
    with Ran() as mode, torch.no_grad():
        result = traced(*inputs)
    return mode.names, result


def loss(weight: torch.Tensor, inputs: torch.Tensor) -> list[torch.Tensor]:
    out = F.layer_norm(F.gelu(inputs @ weight.t()), [4]).clamp(min=0).sum(0, keepdim=True)
    return [out.view(4).to(torch.float64), torch.cat([out, out])]


def test_the_same_operations_are_run() -> None:
    inputs = (torch.randn(4, 3), torch.randn(5, 3))
    traced = make_fx(loss)(*inputs)
    wanted = ran(traced, *inputs)
    call_directly(traced, inputs)
    found = ran(traced, *inputs)
    assert found[0] == wanted[0]
    assert all(map(torch.equal, found[1], wanted[1]))
    kept = [node for node in traced.graph.nodes if isinstance(node.target, OpOverload)]
    assert len(kept) < len(wanted[0]) / 2


@pytest.mark.parametrize(
    "other",
    [
        lambda a, b: torch.add(a, b),  # another operation
        lambda a, b: torch.mul(torch.mul(a, b), 1.0),  # two
        lambda a, b: (_ for _ in ()).throw(TypeError("takes something else")),
    ],
)
def test_a_function_that_runs_something_else_is_left_out(
    other: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_calls, "bound_function", lambda operation: other)
    inputs = (torch.randn(3), torch.randn(3))
    traced = make_fx(lambda a, b: a * b)(*inputs)
    call_directly(traced, inputs)
    (node,) = [node for node in traced.graph.nodes if node.op == "call_function"]
    assert node.target is aten.mul.Tensor


def test_views_of_what_is_fixed_are_made_once() -> None:
    weight, inputs = torch.randn(4, 3), torch.randn(5, 3)
    traced = make_fx(lambda w, x: x.view(5, 3) @ w.t().t().t())(weight, inputs)
    first = next(iter(traced.graph.nodes))
    views = take_out_views(traced, {first: weight})
    traced.recompile()
    assert [view.data_ptr() for view in views] == [weight.data_ptr()]
    names, result = ran(traced, weight, inputs, *views)
    assert torch.equal(result, inputs @ weight.t())
    assert names == ["aten.view.default", "aten.mm.default"]
    weight.zero_()  # what is seen is the tensor's memory, as it is now
    assert not traced(weight, inputs, *views).any()
