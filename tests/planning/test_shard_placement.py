"""Shard placement: however hosts divide the shards, they sum the tree that one host sums."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import JobError
from lockstep.planning.reduction_tree import Node, leaf_slots, most_subtrees, subtrees, tree
from lockstep.planning.shard_placement import ShardPlacement, share


def as_one_would(node: Node | None, places: Mapping[int, Node]) -> Node | None:
    """A tree whose leaves are replaced by the trees that their slots hold."""
    if node is None or isinstance(node, int):
        return None if node is None else places[node]
    left, right = (as_one_would(child, places) for child in node)
    assert left is not None
    assert right is not None
    return left, right


@given(st.data())
def test_hosts_sum_the_tree_that_one_host_sums(data: st.DataObject) -> None:
    """Also where some shards have no gradient, and hosts differ in their numbers of workers."""
    shards = data.draw(st.integers(1, 40))
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    present = data.draw(st.lists(st.booleans(), min_size=shards, max_size=shards))
    workers = {f"h{i}": count for i, count in enumerate(counts)}
    arrangement = ShardPlacement.of(shards, workers)
    trees = arrangement.subtrees
    assert [shard for each in trees for shard in each] == list(range(shards))
    places: dict[int, Node] = {}
    for each in trees:
        inside = tree(tuple(has and shard in each for shard, has in enumerate(present)))
        if inside is not None:
            places[each.start] = inside
    outer = tree(tuple(shard in places for shard in range(shards)))
    assert as_one_would(outer, places) == tree(tuple(present))


@given(st.integers(1, 60), st.data())
def test_room_for_sums(shards: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, shards - 1))
    last = data.draw(st.integers(first + 1, shards))
    mine = range(first, last)
    parts = [*subtrees(shards, 0, first), *subtrees(shards, first, last)]
    slots = leaf_slots(parts, mine, shards)
    behind = [slot for slot in slots.values() if slot >= shards]
    assert len(behind) == len(set(behind)) <= most_subtrees(shards)
    assert all(slots[part.start] == part.start for part in parts if part.start < first)


def test_hosts_with_a_power_of_two_of_shards_send_one_sum_each() -> None:
    for hosts, each in itertools.product((2, 4, 8), (1, 2, 4)):
        arrangement = ShardPlacement.of(hosts * each, {str(i): each for i in range(hosts)})
        assert len(arrangement.subtrees) == hosts


def test_the_sum_over_hosts_has_the_bits_of_one() -> None:
    """What the tree says, done on numbers: floating-point sums depend on their order."""
    torch.manual_seed(0)
    leaves = [torch.randn(()) * 10.0**k for k in torch.randint(-4, 4, (12,)).tolist()]

    def total(node: Node) -> torch.Tensor:
        return leaves[node] if isinstance(node, int) else total(node[0]) + total(node[1])

    whole = tree((True,) * 12)
    assert whole is not None
    for counts in ({"a": 1, "b": 2}, {"a": 3, "b": 1, "c": 1}, {"a": 5, "b": 7}):
        trees = ShardPlacement.of(12, counts).subtrees
        sums = {}
        for each in trees:
            node = tree(tuple(shard in each for shard in range(12)))
            assert node is not None
            sums[each.start] = total(node)
        outer = tree(tuple(shard in sums for shard in range(12)))
        assert outer is not None
        kept, leaves = leaves, [sums.get(shard, leaves[shard]) for shard in range(12)]
        found = total(outer)
        leaves = kept
        assert torch.equal(found, total(whole))


def test_workers_are_shared_out() -> None:
    assert share(6, {"a": 2, "b": 1}) == {"a": 4, "b": 2}
    assert share(3, {"a": 1, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 1}
    with pytest.raises(JobError, match="too few workers"):
        share(2, {"a": 8, "b": 8, "c": 8})
