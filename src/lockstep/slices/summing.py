"""Sums over slices: along one fixed tree, forwards and backwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lockstep.planning.reduction_tree import Node, tree


def sizes_of(length: int, slices: int) -> tuple[int, ...]:
    """The sizes of a dimension's slices: as equal as can be, larger ones first, as those of
    `torch.tensor_split`."""
    each, more = divmod(length, slices)
    return tuple(each + (index < more) for index in range(slices))


def tree_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the slices' partial results along the balanced binary tree over their indices."""

    def total(node: Node) -> torch.Tensor:
        return parts[node] if isinstance(node, int) else total(node[0]) + total(node[1])

    return total(_tree(len(parts)))


def fan_out(x: torch.Tensor, slices: int) -> list[torch.Tensor]:
    """The same tensor for each slice, whose gradients are summed along the tree.

    Autograd adds the gradients of a tensor's uses in an order of its own. Here each view is used
    twice at most, and a + b is b + a, so the order is the tree's.
    """
    found: list[torch.Tensor] = [x] * slices
    if not (x.requires_grad and torch.is_grad_enabled()):
        return found

    def spread(node: Node, value: torch.Tensor) -> None:
        view = value.view_as(value)
        if isinstance(node, int):
            found[node] = view
        else:
            spread(node[0], view)
            spread(node[1], view)

    spread(_tree(slices), x)
    return found


def _tree(slices: int) -> Node:
    node = tree((True,) * slices)
    assert node is not None
    return node
