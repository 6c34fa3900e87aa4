"""Step tail: a step's meetings, sums and updates as one native call.

What is made here does the same as `worker.train_step` with the same tensors, in the same order. Who
calls it says when that is the plain case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lockstep.planning.reduction_tree import Node, depth

Addition = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Left, right, and where their sum goes."""
COMMITTED, REGROUP, NOT_UNIFORM = range(3)
"""How a call ends, see `Ending` in step_tail.h."""
ADAM = ("lr", "beta1", "beta2", "weight_decay", "eps", "amsgrad", "maximize")
SGD = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
"""The options of the kernels, in the order in which they are passed."""


def additions(
    node: Node, leaves: Sequence[torch.Tensor], out: torch.Tensor, piece: int
) -> list[Addition]:
    """The additions of a tree sum, in order, as `collectives.tree_sum` makes them: in pieces of so
    many elements where there are more than two leaves."""
    if isinstance(node, int):
        raise ValueError("a lone leaf is no sum")
    size = out.numel()
    if depth(node) == 1:
        piece = max(size, 1)
    found: list[Addition] = []
    spare = [torch.empty(min(piece, size), dtype=out.dtype) for _ in range(depth(node))]
    for start in range(0, size, piece):
        parts = [leaf[start : start + piece] for leaf in leaves]
        _add(node, parts, out[start : start + piece], spare, found)
    return found


def _add(
    node: Node,
    leaves: Sequence[torch.Tensor],
    out: torch.Tensor,
    spare: Sequence[torch.Tensor],
    found: list[Addition],
) -> torch.Tensor:
    if isinstance(node, int):
        return leaves[node]
    left = _add(node[0], leaves, out, spare, found)
    right = _add(node[1], leaves, spare[0][: out.numel()], spare[1:], found)
    found.append((left, right, out))
    return out


def option_values(options: Mapping[str, Any]) -> list[float] | None:
    """What a kernel is passed of a parameter group's options; None: it is not all plain numbers."""
    if "betas" in options:
        beta1, beta2 = options["betas"]
        named = {**options, "beta1": beta1, "beta2": beta2}
        values = [named[name] for name in ADAM]
    else:
        values = [options[name] for name in SGD]
    if not all(isinstance(value, int | float) for value in values):
        return None
    return [float(value) for value in values]


def lowered_part(
    kernel: str,
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    state: Mapping[str, list[torch.Tensor]],
) -> tuple[Any, ...]:
    """The members of one parameter group, as the native tail takes them."""
    if kernel == "sgd":
        names: tuple[str, ...] = ("momentum_buffer", "", "", "")
    else:
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
    return kernel, list(params), list(grads), *(state.get(name, []) for name in names)
