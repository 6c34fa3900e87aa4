"""Direct calls: a traced graph with less Python around its kernels.

A graph names operations by their overloads, and calling these costs 3 to 5 us each: their arguments
are matched with a schema. PyTorch's functions and methods are bound to the same operations and cost
one. Which overload they come to follows from the types of the arguments, and these are the same
each time: so each call is tried once, and only replaced where that same overload was run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

HOMES = (torch._C._VariableFunctions, torch._C._nn, torch.Tensor)
"""Where the bound functions are."""


def call_directly(traced: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Let a graph call bound functions where they run the same operations. It is run once with
    these inputs: random numbers are drawn, and what the graph changes is changed, perhaps twice.
    """
    trial = _Trial(traced)
    with torch.no_grad():
        trial.run(*inputs)
    for node, function in trial.found.items():
        node.target = function
    traced.recompile()


class _Trial(fx.Interpreter):
    """Runs a graph by bound functions."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__(traced)
        self.found: dict[fx.Node, Callable[..., Any]] = {}
        self._node: fx.Node

    def run_node(self, n: fx.Node) -> Any:
        self._node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = bound_function(target) if isinstance(target, OpOverload) else None
        if bound is not None:
            with _Overloads() as overloads:
                try:
                    result = bound(*args, **kwargs)
                except (TypeError, RuntimeError):  # it takes its arguments in another form
                    overloads.ran.clear()
            if overloads.ran == [target]:
                self.found[self._node] = bound
                return result
        return super().call_function(target, args, kwargs)


class _Overloads(TorchDispatchMode):
    """Notes which operations are run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ran: list[OpOverload] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.ran.append(func)
        return func(*args, **(kwargs or {}))


def bound_function(operation: OpOverload) -> Callable[..., Any] | None:
    """PyTorch's function or method of an operation's name."""
    namespace, _, name = operation._schema.name.partition("::")
    if namespace != "aten":
        return None
    return next((getattr(home, name) for home in HOMES if hasattr(home, name)), None)


def take_out_views(
    traced: fx.GraphModule, fixed: dict[fx.Node, torch.Tensor]
) -> list[torch.Tensor]:
    """Make views of tensors that are the same each time (`fixed`: by placeholder) once and for all;
    returns them, the graph's further inputs."""
    graph, views = traced.graph, dict(fixed)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in list(graph.nodes):
        used = node.all_input_nodes
        if not (_makes_view(node) and used and all(each in views for each in used)):
            continue
        view = node.target(*fx.node.map_arg(node.args, views.__getitem__), **node.kwargs)
        with graph.inserting_after(placeholders[-1]):
            placeholder = graph.placeholder(f"{node.name}_kept")
        placeholders.append(placeholder)
        node.replace_all_uses_with(placeholder)
        graph.erase_node(node)
        views[placeholder] = view
    made = [node for node in placeholders if node in views and node not in fixed]
    for node in made:
        if not node.users:  # others were made of it
            graph.erase_node(node)
    return [views[node] for node in made if node.users]


def _makes_view(node: fx.Node) -> bool:
    """Whether a node only looks at a tensor's memory in another form."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    results = [result.alias_info for result in node.target._schema.returns]
    return len(results) == 1 and results[0] is not None and not results[0].is_write
