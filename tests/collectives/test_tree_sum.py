"""Sums along the tree, of gradients and of buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.collectives.tree_sum import CHUNK, Reducer, combine_buffers
from lockstep.planning.reduction_tree import Node, depth, tree
from tests.support import reference_loop as reference


def stride_doubling(present: Sequence[bool]) -> Node | None:
    """Pairwise summation as it is done in place: at stride s, slot i takes slot i + s."""
    slots: list[Node | None] = [index if has else None for index, has in enumerate(present)]
    stride = 1
    while stride < len(slots):
        for left in range(0, len(slots) - stride, 2 * stride):
            first, second = slots[left], slots[left + stride]
            slots[left] = (
                (first, second)
                if first is not None and second is not None
                else (second if first is None else first)
            )
        stride *= 2
    return slots[0]


masks = st.lists(st.booleans(), min_size=1, max_size=40).map(tuple)


@given(masks)
def test_tree_is_stride_doubling(present: tuple[bool, ...]) -> None:
    assert tree(present) == stride_doubling(present)


def test_tree_of_six() -> None:
    assert tree((True,) * 6) == (((0, 1), (2, 3)), (4, 5))
    assert tree((True, False, True, True, False, False)) == (0, (2, 3))
    assert tree((False, False)) is None


@given(masks.filter(any))
def test_tree_is_balanced(present: tuple[bool, ...]) -> None:
    node = tree(present)
    assert node is not None
    assert depth(node) <= math.ceil(math.log2(len(present))) if len(present) > 1 else True


@settings(max_examples=40)
@given(
    st.lists(st.booleans(), min_size=1, max_size=13).map(tuple),
    st.sampled_from([1, 3, 64, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_reducer_sums_along_the_tree(
    present: tuple[bool, ...], size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(size)
    leaves = [torch.randn(size, generator=generator).to(dtype) for _ in present]
    wanted = reference.pairwise(
        [leaf if has else None for leaf, has in zip(leaves, present, strict=True)]
    )
    out = torch.full((size,), 7.0, dtype=dtype)
    Reducer(cast(Any, SimpleNamespace(slots=leaves))).sum(present, leaves, out)
    assert torch.equal(out, torch.full_like(out, 7.0) if wanted is None else wanted)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9).filter(any), st.integers(0, 99))
def test_buffers_combine_as_documented(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [count / sum(counts) for count in counts]
    for made in (
        torch.randn(5, 3, generator=generator),
        torch.full((4,), -torch.inf),
        torch.tensor(0.1, dtype=torch.float64),
        torch.randint(-9, 9, (7,), generator=generator),
        torch.rand(6, generator=generator) < 0.5,
    ):
        slots = [made.clone() for _ in counts]
        if made.ndim and not torch.isinf(made.double()).any():
            slots = [slot[torch.randperm(len(slot), generator=generator)] for slot in slots]
        committed = torch.zeros_like(made)
        averaged = made.is_floating_point()
        combine_buffers(committed, slots, weights, "mean" if averaged else "max")
        present = [slot if weight else None for slot, weight in zip(slots, weights, strict=True)]
        assert torch.equal(committed, reference.combined(present, weights))
        if made.ndim == 0 or torch.isinf(made.double()).any():
            assert torch.equal(committed, made)  # a constant stays what it is


def test_buffers_by_their_rules() -> None:
    slots = [torch.tensor([3, 1]), torch.tensor([9, 9]), torch.tensor([2, 6]), torch.tensor([5, 4])]
    weights = (0.5, 0.0, 0.25, 0.25)  # the second has no samples
    for rule, wanted in {
        "sum": [2 + 1 + 0 + 3, 2 - 1 + 4 + 2], "max": [5, 6], "min": [2, 1], "last": [5, 4],
        None: [2, 2],
    }.items():  # fmt: skip
        committed = torch.tensor([2, 2])
        combine_buffers(committed, slots, weights, cast(Any, rule))
        assert committed.tolist() == wanted, rule
        combine_buffers(committed, slots, (0.0, 1.0, 0.0, 0.0), cast(Any, rule))
        assert committed.tolist() == [9, 9], "what one shard alone leaves is the whole batch's"


def test_changes_are_summed_along_the_tree() -> None:
    generator = torch.Generator().manual_seed(3)
    slots = [torch.randn(5, generator=generator) for _ in range(6)]
    before = torch.randn(5, generator=generator)
    committed = before.clone()
    combine_buffers(committed, slots, (1 / 6,) * 6, "sum")
    changes = reference.pairwise([slot - before for slot in slots])
    assert changes is not None
    assert torch.equal(committed, before + changes)
