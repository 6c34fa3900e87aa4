"""Reduction tree: the balanced binary tree over shards, along which everything is summed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

Node = int | tuple["Node", "Node"]
"""The order of a sum: a shard, or two such orders (see `tree`)."""


def subtrees(shards: int, first: int, last: int) -> list[range]:
    """The fewest complete subtrees, of the tree over `shards`, that are the run `first:last`."""
    found = []
    while first < last:
        size = 1
        while first % (2 * size) == 0 and size < shards and min(first + 2 * size, shards) <= last:
            size *= 2
        found.append(range(first, min(first + size, shards)))
        first = found[-1].stop
    return found


def most_subtrees(shards: int) -> int:
    """How many subtrees of more than one shard a run can have."""
    return min(shards // 2, 2 * max((shards - 1).bit_length() - 1, 1)) if shards > 1 else 0


def leaf_slots(parts: Sequence[range], host_shards: range, shards: int) -> dict[int, int]:
    """For each subtree, by its first shard, the slot that has its sum.

    Sums that this host makes itself, of more than one shard, lie behind the shards' own slots: the
    gradients that they are made of are still needed, should a worker die.
    """
    found, behind = {}, shards
    for tree in parts:
        if len(tree) > 1 and tree.start in host_shards:
            found[tree.start] = behind
            behind += 1
        else:
            found[tree.start] = tree.start
    return found


@lru_cache(maxsize=256)
def tree(present: tuple[bool, ...]) -> Node | None:
    """The order in which shards are summed: a balanced binary tree over shard indices.

    Neighbours first: ((0 1)(2 3))((4 5)...). A shard without a gradient leaves its place empty,
    and its sibling moves up. A leaf is a shard's index.
    """
    level: list[Node | None] = [index if has else None for index, has in enumerate(present)]
    while len(level) > 1:
        pairs = [level[index : index + 2] for index in range(0, len(level), 2)]
        level = [_join(pair) for pair in pairs]
    return level[0]


def _join(pair: list[Node | None]) -> Node | None:
    nodes = [node for node in pair if node is not None]
    if not nodes:
        return None
    return nodes[0] if len(nodes) == 1 else (nodes[0], nodes[1])


def depth(node: Node) -> int:
    """How many levels of sums the tree has."""
    return 0 if isinstance(node, int) else 1 + max(depth(node[0]), depth(node[1]))
