"""Traced shard: the forward and backward pass of a shard as one list of kernels.

What autograd would do for a captured loss is written down once, by `make_fx`, and then run without
autograd, hooks and modules. The kernels, their arguments and their order are the same, and so are
the bytes. The gradients of matrices are computed right into the shard's slot. Where the native
library is there, the list is run without the interpreter, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lockstep.native.library import Library
from lockstep.native.lowering import NativeList, NotLowered
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.shared_state import SharedState
from lockstep.worker.direct_calls import call_directly, take_out_views
from lockstep.worker.loss_capture import CapturedLoss, UntraceableError

aten = torch.ops.aten


class Joint:
    """The captured loss and its gradients as one function of tensors."""

    def __init__(
        self, captured: CapturedLoss, shared: SharedState, leaves: Sequence[torch.Tensor]
    ) -> None:
        """`leaves` are the tensors of the batch that was captured.

        Raises:
            UntraceableError: the loss depends on tensors that are not the model's and not these.
        """
        params, constants = shared.params, _constants_of(shared)
        self._graph = captured.graph
        self._places = [_place(tensor, params, constants, leaves) for tensor in captured.inputs]
        self.used = sorted({index for kind, index in self._places if kind == "param"})
        """The parameters that it depends on, by index."""
        fixed = [constants[index] for kind, index in self._places if kind == "constant"]
        self.inputs: list[torch.Tensor] = [*(params[index] for index in self.used), *fixed]
        """What it is given first; then come a batch's tensors, and the gradient at the root."""

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor | None]:
        """The loss, and the gradient of each parameter that it depends on."""
        mine = dict(zip(self.used, tensors, strict=False))
        others = iter(tensors[len(self.used) : len(self.inputs)])
        leaves, root = tensors[len(self.inputs) : -1], tensors[-1]
        arguments = [
            mine[index] if kind == "param" else leaves[index] if kind == "leaf" else next(others)
            for kind, index in self._places
        ]
        (loss,) = self._graph(*arguments)
        grads = torch.autograd.grad(loss, list(mine.values()), root, allow_unused=True)
        return [loss.detach(), *grads]


class TracedShard:
    """Forward and backward of the captured loss, for batches of one form."""

    def __init__(
        self,
        captured: CapturedLoss,
        shared: SharedState,
        leaves: Sequence[torch.Tensor],
        native: Library,
    ) -> None:
        """As `Joint`; it is computed with these once. `native`: the library, or why there is none.

        Raises:
            UntraceableError: the loss depends on other tensors, or on none of the parameters.
        """
        self.captured = captured
        joint = Joint(captured, shared, leaves)
        traced = make_fx(joint)(*joint.inputs, *leaves, torch.ones_like(captured.loss))
        graph, self._with_gradient = simplify(traced, joint.used)
        self.draws = draws(graph)
        """Whether it draws random numbers."""
        params = [shared.params[index] for index in self._with_gradient]
        self._in_place = _compute_in_place(graph, params)
        self._fixed = [each.detach() for each in joint.inputs]
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._views = take_out_views(traced, dict(zip(inputs, self._fixed, strict=False)))
        copied = len(self._with_gradient) - len(self._in_place)
        self._native, self.why_not_native = _lower(native, graph, copied)
        self._bound: dict[int, Any] = {}
        """By slot: the native list with the slot's gradients."""
        targets = [torch.empty_like(params[place]) for place in self._in_place]
        self._given = range(len(self._fixed), len(self._fixed) + len(leaves) + 1)
        root = torch.ones_like(captured.loss)
        call_directly(traced, [*self._fixed, *leaves, root, *targets, *self._views])
        self._run: Callable[..., list[torch.Tensor]] = traced.forward
        self._targets: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self.flags = flags_of(shared, self._with_gradient)
        """By parameter: whether there is a gradient of it."""

    def run(self, leaves: Sequence[torch.Tensor], root: torch.Tensor, slot: GradientSlot) -> float:
        """Compute a shard: gradients into its slot; returns the loss. `root`, the gradient at the
        root, has the form of the captured loss."""
        if self._native is not None:
            if id(slot) not in self._bound:
                self._bound[id(slot)] = self._bind(self._native, slot)
            native: float = self._bound[id(slot)].run([*leaves, root])
            return native
        if id(slot) not in self._targets:
            self._targets[id(slot)] = self._targets_in(slot)
        direct, copied = self._targets[id(slot)]
        with torch.no_grad():
            loss, *grads = self._run(*self._fixed, *leaves, root, *direct, *self._views)
            if copied:
                torch._foreach_copy_(copied, grads)
        return loss.item()

    def _bind(self, native: NativeList, slot: GradientSlot) -> Any:
        direct, copied = self._targets_in(slot)
        return native.bind(self._given, [*self._fixed, *direct, *self._views, *copied])

    def _targets_in(self, slot: GradientSlot) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Where gradients go: those that are computed in place, and those that are copied."""
        targets = [slot.grads[index] for index in self._with_gradient]
        direct = [targets[place] for place in self._in_place]
        copied = [each for place, each in enumerate(targets) if place not in self._in_place]
        return direct, copied


def _lower(library: Library, graph: fx.Graph, copied: int) -> tuple[NativeList | None, str]:
    """The graph as a native list, or why there is none."""
    if library.module is None:
        return None, library.why_not
    try:
        return NativeList(library.module, graph, copied), ""
    except (NotLowered, RuntimeError) as error:  # an argument of a type that C++ does not take
        return None, str(error).partition("\n")[0][:200]


def flags_of(shared: SharedState, with_gradient: Sequence[int]) -> npt.NDArray[np.uint8]:
    """By parameter: 1 where there is a gradient of it."""
    flags = np.zeros(len(shared.params), np.uint8)
    flags[with_gradient] = 1
    return flags


def _constants_of(shared: SharedState) -> list[torch.Tensor]:
    """What a model has besides trainable parameters: frozen ones and buffers."""
    trainable = {id(parameter) for parameter in shared.params}
    frozen = (each for each in shared.model.parameters() if id(each) not in trainable)
    return [*frozen, *(own for _, own in shared.buffers)]


def draws(graph: fx.Graph) -> bool:
    """Whether a graph draws random numbers."""
    return any(
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
        for node in graph.nodes
    )


def _place(
    tensor: torch.Tensor,
    params: Sequence[torch.Tensor],
    constants: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor],
) -> tuple[str, int]:
    """What an input of the graph is."""
    for kind, known in (("param", params), ("constant", constants), ("leaf", leaves)):
        for index, each in enumerate(known):
            if each is tensor:
                return kind, index
    raise UntraceableError("the loss uses a tensor that is of no module and not of the batch")


def simplify(traced: fx.GraphModule, used: Sequence[int]) -> tuple[fx.Graph, list[int]]:
    """Take out what changes no value; which parameters have a gradient.

    Raises:
        UntraceableError: none has one.
    """
    graph = traced.graph
    for node in list(graph.nodes):
        inner: Any = node.args[0] if node.args else None
        if node.target is aten.detach.default:
            node.replace_all_uses_with(inner)
        elif node.target is aten.t.default and inner.target is aten.t.default:
            node.replace_all_uses_with(inner.args[0])
    output = _output_of(graph)
    loss, *grads = _returned(output)
    there = [place for place, gradient in enumerate(grads) if gradient is not None]
    if not there:
        raise UntraceableError("the loss depends on no parameter")
    output.args = ([loss, *(grads[place] for place in there)],)
    graph.eliminate_dead_code()
    return graph, [used[place] for place in there]


def _compute_in_place(graph: fx.Graph, params: Sequence[nn.Parameter]) -> list[int]:
    """Let products of matrices that are gradients be computed into tensors that are given, as
    further inputs; which of the gradients they are. The graph gives the loss and the others."""
    output = _output_of(graph)
    loss, *grads = _returned(output)
    in_place = [
        place
        for place, gradient in enumerate(grads)
        if gradient.target is aten.mm.default
        and len(gradient.users) == 1
        and grads.count(gradient) == 1
        and params[place].is_contiguous()
    ]
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for place in reversed(in_place):
        with graph.inserting_after(last):
            target = graph.placeholder(f"target_{place}")
        with graph.inserting_before(grads[place]):
            graph.call_function(aten.mm.out, grads[place].args, {"out": target})
    output.args = ([loss, *(g for place, g in enumerate(grads) if place not in in_place)],)
    for place in in_place:
        graph.erase_node(grads[place])
    graph.lint()
    return in_place


def _output_of(graph: fx.Graph) -> fx.Node:
    node: fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return node


def _returned(output: fx.Node) -> list[Any]:
    """The nodes that a graph returns, or None."""
    nodes: Any = output.args[0]
    return list(nodes)
