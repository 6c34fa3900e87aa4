"""Traced shard: the forward and backward pass of a shard as one list of kernels.

What autograd would do for a captured loss is written down once, by `make_fx`, and then run without
autograd, hooks and modules. The kernels, their arguments and their order are the same, and so are
the bytes. The gradients of matrices are computed right into the shard's slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from lockstep.state.gradient_slots import GradientSlot
from lockstep.worker.loss_capture import CapturedLoss, UntraceableError

aten = torch.ops.aten


class TracedShard:
    """Forward and backward of the captured loss, for batches of one form."""

    def __init__(
        self,
        captured: CapturedLoss,
        params: Sequence[nn.Parameter],
        constants: Sequence[torch.Tensor],
        leaves: Sequence[torch.Tensor],
        root: torch.Tensor,
    ) -> None:
        """`params` are the trainable ones, `constants` what else the model has: frozen parameters
        and buffers, which are looked up by identity. `leaves` are the tensors of a batch of that
        form, `root` the gradient at the root. The graph is computed with them once.

        Raises:
            UntraceableError: the loss depends on other tensors, or on none of the parameters.
        """
        self.captured = captured
        places = [_place(tensor, params, constants, leaves) for tensor in captured.inputs]
        used = sorted({index for kind, index in places if kind == "param"})
        fixed = [constants[index] for kind, index in places if kind == "constant"]

        def joint(*tensors: torch.Tensor) -> list[torch.Tensor | None]:
            given = list(tensors)
            mine = dict(zip(used, given, strict=False))
            others = iter(given[len(used) : len(used) + len(fixed)])
            batch, last = given[len(used) + len(fixed) : -1], given[-1]
            arguments = [
                mine[index] if kind == "param" else batch[index] if kind == "leaf" else next(others)
                for kind, index in places
            ]
            (loss,) = captured.graph(*arguments)
            grads = torch.autograd.grad(loss, list(mine.values()), last, allow_unused=True)
            return [loss.detach(), *grads]

        traced = make_fx(joint)(*(params[index] for index in used), *fixed, *leaves, root)
        graph, self._with_gradient = _simplify(traced, used)
        self._in_place = _compute_in_place(graph, [params[i] for i in self._with_gradient])
        traced.recompile()
        self._run: Callable[..., list[torch.Tensor]] = traced.forward
        self.root = root
        """Has the form of the loss."""
        self.flags = np.zeros(len(params), np.uint8)
        """By parameter: whether there is a gradient of it."""
        self.flags[self._with_gradient] = 1
        self._fixed = [*(params[index].detach() for index in used), *fixed]
        self._targets: dict[int, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        self.draws = any(
            isinstance(node.target, torch._ops.OpOverload)
            and torch.Tag.nondeterministic_seeded in node.target.tags
            for node in graph.nodes
        )
        """Whether it draws random numbers."""

    def run(
        self, leaves: Sequence[torch.Tensor], root: torch.Tensor, slot: GradientSlot
    ) -> torch.Tensor:
        """Compute a shard: gradients into its slot; returns the loss."""
        if id(slot) not in self._targets:
            self._targets[id(slot)] = self._targets_in(slot)
        direct, copied = self._targets[id(slot)]
        with torch.no_grad():
            loss, *grads = self._run(*self._fixed, *leaves, root, *direct)
            if copied:
                torch._foreach_copy_(copied, grads)
        return loss

    def _targets_in(self, slot: GradientSlot) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Where gradients go: those that are computed in place, and those that are copied."""
        targets = [slot.grads[index] for index in self._with_gradient]
        direct = [targets[place] for place in self._in_place]
        copied = [each for place, each in enumerate(targets) if place not in self._in_place]
        return direct, copied


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


def _simplify(traced: fx.GraphModule, used: Sequence[int]) -> tuple[fx.Graph, list[int]]:
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
