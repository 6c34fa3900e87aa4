"""A traced graph as a native list: the operations of the graph, in its order, and its bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lockstep.native.lowering import NativeList, NotLowered
from tests.support.native_path import native_module

__all__ = ["native_module"]  # a fixture

Tensors = list[torch.Tensor]
aten = torch.ops.aten


def layers(weight: torch.Tensor, inputs: torch.Tensor) -> Tensors:
    out = F.layer_norm(F.gelu(inputs @ weight.t()), [4]).clamp(min=0).to(torch.float64)
    return [out.sum().float(), torch.cat([out, out]).float(), out.mean(0)]


def pieces(weight: torch.Tensor, inputs: torch.Tensor) -> Tensors:
    first, _, last = inputs.split([1, 1, 1], 1)
    return [(first * last).mean(), torch.stack([first, last]), weight.unbind(1)[1] * 2]


def indexed(weight: torch.Tensor, inputs: torch.Tensor) -> Tensors:
    chosen = inputs[:, torch.arange(2)]
    return [chosen.sum(), aten.index_put(inputs, [None, torch.arange(2)], chosen * 2, True)]


def classes(weight: torch.Tensor, inputs: torch.Tensor) -> Tensors:
    scores = torch.addmm(torch.zeros(4), inputs, weight.t(), beta=0.5)
    return [F.cross_entropy(scores, torch.arange(5) % 4, label_smoothing=0.1), scores.amax(1)]


def images(weight: torch.Tensor, inputs: torch.Tensor) -> Tensors:
    image = inputs.view(1, 1, 5, 3)
    out = F.max_pool2d(F.conv2d(image, weight.view(1, 1, 4, 3), padding=2), 2)
    return [out.sum(), F.interpolate(out, scale_factor=2.0, mode="nearest")]


def dropped(weight: torch.Tensor, inputs: torch.Tensor) -> Tensors:
    out = F.dropout(inputs, 0.5) + torch.rand_like(inputs)
    return [out.sum(), out]


GRAPHS: list[Callable[..., Tensors]] = [layers, pieces, indexed, classes, images, dropped]


def given() -> Tensors:
    return [torch.randn(4, 3), torch.randn(5, 3)]


def run_native(module: Any, graph: fx.Graph, inputs: Tensors, copied: Tensors) -> float:
    bound = NativeList(module, graph, len(copied)).bind([1], [inputs[0], *copied])
    found: float = bound.run(inputs[1:])
    return found


@pytest.mark.parametrize("function", GRAPHS, ids=lambda function: function.__name__)
def test_the_bytes_of_the_graph(function: Callable[..., Tensors], native_module: Any) -> None:
    inputs = given()
    traced = make_fx(function)(*inputs)
    torch.manual_seed(4)
    with torch.no_grad():
        loss, *wanted = traced(*inputs)
    torch.manual_seed(4)
    found = [torch.empty_like(each) for each in wanted]
    before = [each.clone() for each in inputs]
    lowered = run_native(native_module, _own_constants(traced), inputs, found)
    assert lowered == loss.item()
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, inputs, before))


def _own_constants(traced: fx.GraphModule) -> fx.Graph:
    assert not [node for node in traced.graph.nodes if node.op == "get_attr"]
    return traced.graph


@pytest.mark.parametrize("function", GRAPHS, ids=lambda function: function.__name__)
def test_the_operations_of_the_graph(function: Callable[..., Tensors], native_module: Any) -> None:
    inputs = given()
    traced = make_fx(function)(*inputs)
    wanted = [
        str(node.target).split(".")[1]
        for node in traced.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    ]
    copied = [torch.empty_like(each) for each in traced(*inputs)[1:]]
    bound = NativeList(native_module, traced.graph, len(copied)).bind([1], [inputs[0], *copied])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        bound.run(inputs[1:])
    events = [event for event in profiled.events() if event.cpu_parent is None]
    names = [event.name.removeprefix("aten::") for event in events]
    assert names[: len(wanted)] == wanted
    assert set(names[len(wanted) :]) <= {"_foreach_copy_", "item"}


def test_it_is_run_again_and_again_and_holds_nothing(native_module: Any) -> None:
    inputs = given()
    traced = make_fx(layers)(*inputs)
    wanted = traced(*inputs)
    copied = [torch.empty_like(each) for each in wanted[1:]]
    bound = NativeList(native_module, traced.graph, 2).bind([1], [inputs[0], *copied])
    for _ in range(3):
        leaf = inputs[1].clone()
        storage = leaf.untyped_storage()
        before = torch._C._storage_Use_Count(storage._cdata)
        assert bound.run([leaf]) == wanted[0].item()
        assert torch._C._storage_Use_Count(storage._cdata) == before
        inputs[0].copy_(inputs[0])  # what is bound is looked at anew
    inputs[0].zero_()
    assert bound.run([inputs[1]]) == traced(*inputs)[0].item()


def test_an_error_of_a_kernel_is_raised_and_leaves_it_usable(native_module: Any) -> None:
    inputs = given()
    traced = make_fx(layers)(*inputs)
    copied = [torch.empty_like(each) for each in traced(*inputs)[1:]]
    bound = NativeList(native_module, traced.graph, 2).bind([1], [inputs[0], *copied])
    with pytest.raises(RuntimeError, match="shapes"):
        bound.run([torch.randn(5, 4)])
    assert bound.run([inputs[1]]) == traced(*inputs)[0].item()


def test_what_has_no_form_is_left_to_python(native_module: Any) -> None:
    inputs = given()

    def operation_of_python(graph: fx.Graph) -> None:
        next(node for node in graph.nodes if node.op == "call_function").target = torch.mm

    def method(graph: fx.Graph) -> None:
        node = next(node for node in graph.nodes if node.op == "call_function")
        node.op, node.target = "call_method", "mm"

    for change in (operation_of_python, method):
        traced = make_fx(lambda weight, x: [(x @ weight.t()).sum()])(*inputs)
        change(traced.graph)
        with pytest.raises(NotLowered):
            NativeList(native_module, traced.graph, 0)
