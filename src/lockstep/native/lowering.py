"""Lowering: a traced graph as a native list of kernels, operation for operation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

Lowered = tuple[str, Any]
"""An argument: `("constant", value)`, `("register", number)`, or a list of registers."""
NOTHING = -1


class NotLowered(Exception):
    """A graph with something that the native list has no form for, and what that is."""


class NativeList:
    """The list of one graph. `bind` makes it one that can be run."""

    def __init__(self, module: Any, graph: fx.Graph, copied: int) -> None:
        """`module` is the library. The graph returns the loss and `copied` more tensors, which are
        copied to where they are wanted at the end of a run.

        Raises:
            NotLowered: it cannot be.
        """
        self._module = module
        self._registers: dict[fx.Node, int] = {}
        self._elements: dict[fx.Node, list[int]] = {}
        """Of operations with several results: where each is."""
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        count = 0
        for node in graph.nodes:
            results = _results(node)
            numbers = list(range(count, count + results))
            count += results
            if results == 1:
                self._registers[node] = numbers[0]
            else:
                self._elements[node] = numbers
        self._wanted = list(range(count, count + copied))
        self._list = module.KernelList(count + copied)
        for node in graph.nodes:
            if node.op == "call_function":
                self._add(node)
            elif node.op not in ("placeholder", "output"):
                raise NotLowered(f"the graph has a {node.op}")
        returned: Any = next(iter(reversed(graph.nodes))).args[0]
        loss, *rest = [self._number(each) for each in returned]
        if len(rest) != copied:
            raise NotLowered("the graph returns something else than gradients")
        self._loss = loss
        if copied:
            self._list.call(
                "aten::_foreach_copy_",
                "",
                [("tensors", self._wanted), ("tensors", rest), ("constant", False)],
                [],
            )

    def bind(self, given: Sequence[int], tensors: Sequence[torch.Tensor]) -> Any:
        """A list that can be run: `given` are the places, among the graph's inputs, of what it is
        given in each run, `tensors` all others in order, then where the rest is copied to."""
        numbers = [self._registers[node] for node in self._inputs]
        inputs = [numbers[place] for place in given]
        kept = [number for number in numbers if number not in inputs] + self._wanted
        if len(kept) != len(tensors):
            raise NotLowered("the graph takes something else than was bound")
        self._list.close(self._loss, kept)
        return self._module.BoundList(self._list, kept, list(tensors), inputs)

    def _add(self, node: fx.Node) -> None:
        target = node.target
        if target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            if not isinstance(index, int):
                raise NotLowered("the graph takes a slice of a list")
            if source not in self._elements:
                self._list.choose(self._number(source), index, self._number(node))
            return
        if not isinstance(target, OpOverload) or target.namespace != "aten":
            raise NotLowered(f"the graph calls {target}")
        schema = target._schema
        arguments = [
            self._argument(argument, node, place) for place, argument in enumerate(schema.arguments)
        ]
        results = self._elements.get(node)
        if results is None:
            results = [self._registers[node]]
        self._list.call(schema.name, schema.overload_name, arguments, results)

    def _argument(self, argument: Any, node: fx.Node, place: int) -> Lowered:
        if not argument.kwarg_only and place < len(node.args):
            value: Any = node.args[place]
        elif argument.name in node.kwargs:
            value = node.kwargs[argument.name]
        elif argument.has_default_value():
            value = argument.default_value
        else:
            raise NotLowered(f"{node.target} has no {argument.name}")
        if isinstance(value, fx.Node):
            return "register", self._number(value)
        nodes = isinstance(value, list | tuple) and any(isinstance(v, fx.Node) for v in value)
        if not nodes:
            return "constant", list(value) if isinstance(value, list | tuple) else value
        kind = str(argument.type)
        if kind == "List[Tensor]":
            return "tensors", [self._number(each) for each in value]
        if kind == "List[Optional[Tensor]]":
            numbers = [NOTHING if each is None else self._number(each) for each in value]
            return "optional tensors", numbers
        raise NotLowered(f"{node.target} takes numbers that are computed")

    def _number(self, node: Any) -> int:
        """Where a node's value is."""
        if not isinstance(node, fx.Node):
            raise NotLowered("the graph has a constant where a tensor should be")
        if node.target is operator.getitem and node.args[0] in self._elements:
            source, index = node.args
            return self._elements[source][index]  # type: ignore[index]
        if node not in self._registers:
            raise NotLowered(f"the graph uses all results of {node.target} at once")
        return self._registers[node]


def _results(node: fx.Node) -> int:
    """How many registers a node's results take."""
    if isinstance(node.target, OpOverload):
        return len(node.target._schema.returns)
    return 1
