"""Where tensors lie, and who may cut them where: arithmetic without a process."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lockstep.optim.probes import Kind, may_cut
from lockstep.planning.blocks import (
    BLOCK,
    GROUP,
    SPARSE_BLOCKS,
    Block,
    cut_blocks,
    group_blocks,
    own_blocks,
)
from lockstep.planning.byte_ranges import ALIGN, ByteRange, merge_ranges
from lockstep.planning.digest_sample import plan_digest_sample
from lockstep.planning.memory_layout import Entry, Layout
from lockstep.state.allocation import contiguous_stride, dense_stride

# Blocks.

block_sizes = st.lists(
    st.integers(0, 3000) | st.integers(BLOCK - 2, BLOCK + 2) | st.integers(0, 3_000_000), max_size=8
)


@given(block_sizes, st.data())
def test_blocks_partition_each_parameter(sizes: list[int], data: st.DataObject) -> None:
    cuttable = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    blocks = cut_blocks(sizes, cuttable)
    assert [block.param for block in blocks] == sorted(block.param for block in blocks)
    for index, (size, may) in enumerate(zip(sizes, cuttable, strict=True)):
        mine = [block for block in blocks if block.param == index]
        edges = [block.start for block in mine] + [size]
        assert edges[0] == 0
        assert [block.stop for block in mine] == edges[1:]
        assert all(block.start % 64 == 0 for block in mine)
        assert all(block.whole == (len(mine) == 1) for block in mine)
        assert may or len(mine) == 1
        assert all(block.size >= BLOCK for block in mine[:-1])


@given(st.integers(1, 300), st.integers(1, 200_000))
def test_sparse_tables_are_cut_between_rows_into_few_blocks(width: int, rows: int) -> None:
    size = width * rows
    *table, _ = cut_blocks([size, 8], [True, True], {0: width}, {0})
    assert 1 <= len(table) <= SPARSE_BLOCKS
    assert all(block.start % width == 0 == block.start % 64 for block in table)
    assert sum(block.size for block in table) == size


@given(block_sizes, st.integers(1, 12))
def test_owners_share_evenly(sizes: list[int], workers: int) -> None:
    blocks = cut_blocks(sizes, [True] * len(sizes))
    runs = own_blocks(blocks, workers)
    assert len(runs) == workers
    assert [number for run in runs for number in run] == list(range(len(blocks)))
    loads = [sum(blocks[number].size for number in run) for run in runs]
    largest = max((block.size for block in blocks), default=0)
    assert max(loads) <= sum(sizes) / workers + largest


# Ranges and groups.


@st.composite
def disjoint_ranges(draw: st.DrawFn) -> list[ByteRange]:
    """Ranges as the layout has them: some touch, some have padding or more between them."""
    ranges, cursor = [], 0
    for _ in range(draw(st.integers(0, 12))):
        gap = draw(st.sampled_from(["touch", "align", "apart"]))
        if gap != "touch":
            cursor = math.ceil(cursor / ALIGN) * ALIGN + (gap == "apart") * 3 * ALIGN
        nbytes = draw(st.integers(1, 1000))
        ranges.append(ByteRange(offset=cursor, nbytes=nbytes))
        cursor += nbytes
    return draw(st.permutations(ranges))


def bytes_of(ranges: Sequence[ByteRange]) -> set[int]:
    return {at for item in ranges for at in range(item.offset, item.offset + item.nbytes)}


@given(disjoint_ranges())
def test_merged_ranges_cover_the_same_bytes(ranges: list[ByteRange]) -> None:
    merged = merge_ranges(ranges)
    assert merge_ranges(merged) == merged
    ends = [item.offset + item.nbytes for item in merged]
    assert all(end < later.offset for end, later in zip(ends, merged[1:], strict=False))
    covered, needed = bytes_of(merged), bytes_of(ranges)
    assert needed <= covered
    ends_of_needed = {item.offset + item.nbytes for item in ranges}
    for at in covered - needed:  # only padding, up to the next boundary
        end = max(end for end in ends_of_needed if end <= at)
        assert at < math.ceil(end / ALIGN) * ALIGN


@given(st.lists(st.integers(0, GROUP + 5), min_size=1, max_size=20))
def test_groups_are_runs_of_bounded_size(sizes: list[int]) -> None:
    blocks = [Block(param=i, start=0, stop=size, whole=True) for i, size in enumerate(sizes)]
    groups = group_blocks(blocks, range(len(blocks)))
    assert [number for group in groups for number in group] == list(range(len(blocks)))
    for group in groups:
        assert len(group) == 1 or sum(sizes[number] for number in group) <= GROUP


def test_who_digests_what() -> None:
    """A parameter and its optimizer's state are its owner's; everything else is everybody's, and
    what nobody digests for all is in no unit."""
    kinds = {
        "a": "param", "b": "param", "a/momentum": "optim", "a.b/step": "optim", "frozen": "param",
        "a.b": "param", "mean": "buffer", "residual/0/a": "residual",
    }  # fmt: skip
    entries = tuple(
        Entry(
            name=name, kind=cast(Any, kind), dtype="float32", shape=(2048,), stride=(1,),
            offset=number * 8192, nbytes=8192,
        )
        for number, (name, kind) in enumerate(kinds.items())
    )  # fmt: skip
    audit = plan_digest_sample(Layout(
        entries=entries, blocks=(), trainable=("a", "b", "a.b"), state_bytes=65536, slots_bytes=0,
        exported=(),
    ))  # fmt: skip
    seen: dict[str, bool] = {}
    for step in range(0, 64 * audit.every, audit.every):
        apart, others = audit.split(step, {0, 1})
        assert sorted(apart | others) == list(range(len(audit.units(step))))
        seen |= {unit.name.partition("[")[0]: True for unit in apart.values()}
        seen |= {unit.name.partition("[")[0]: False for unit in others.values()}
        assert audit.split(step, ()) == ({}, dict(enumerate(audit.units(step))))
    assert seen == {
        "a": True, "b": True, "a/momentum": True, "a.b/step": False, "frozen": False, "a.b": False,
        "mean": False,
    }  # fmt: skip


@given(st.permutations(range(4)), st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_dense_strides_are_kept(axes: list[int], shape: list[int]) -> None:
    """Any permutation of a row-major tensor addresses each of its elements once."""
    tensor = torch.zeros(shape).permute(axes)
    stride = dense_stride(tensor)
    flat = torch.arange(tensor.numel()).as_strided(tensor.shape, stride)
    assert sorted(flat.flatten().tolist()) == list(range(tensor.numel()))
    used = [
        (own, kept)
        for own, kept, n in zip(tensor.stride(), stride, tensor.shape, strict=True)
        if n > 1
    ]
    assert all(own == kept for own, kept in used)


def test_strides_with_gaps_become_row_major() -> None:
    assert dense_stride(torch.zeros(4, 6)[:, ::2]) == (3, 1)
    assert dense_stride(torch.zeros(3).expand(4, 3)) == (3, 1)
    assert contiguous_stride((2, 0, 3)) == (3, 3, 1)


# Optimizers.


@pytest.mark.parametrize(
    ("kind", "options", "cut"),
    [
        ("SGD", {"momentum": 0.9}, True),
        ("SGD", {"fused": True}, True),
        ("Adam", {}, True),
        ("AdamW", {"fused": True}, True),
        ("Adagrad", {}, True),
        ("RMSprop", {}, True),
        ("Adafactor", {}, False),
        ("Muon", {}, False),
        ("SparseAdam", {}, True),
    ],
)
def test_which_optimizers_may_cut_a_tensor(kind: str, options: dict[str, Any], cut: bool) -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)([weight], lr=0.1, **options)
    groups = [dict(group) for group in optimizer.param_groups]
    sparse = kind == "SparseAdam"
    assert may_cut(optimizer, Kind(group=0, dtype=torch.float32, sparse=sparse)) is cut
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert optimizer.param_groups[0]["params"] == [weight]
