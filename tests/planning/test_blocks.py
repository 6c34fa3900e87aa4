"""Blocks: parameters cut on a fixed grid, and shared evenly among owners."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lockstep.planning.blocks import (
    BLOCK,
    GROUP,
    SPARSE_BLOCKS,
    Block,
    cut_blocks,
    group_blocks,
    own_blocks,
)

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


@given(st.lists(st.integers(0, GROUP + 5), min_size=1, max_size=20))
def test_groups_are_runs_of_bounded_size(sizes: list[int]) -> None:
    blocks = [Block(param=i, start=0, stop=size, whole=True) for i, size in enumerate(sizes)]
    groups = group_blocks(blocks, range(len(blocks)))
    assert [number for group in groups for number in group] == list(range(len(blocks)))
    for group in groups:
        assert len(group) == 1 or sum(sizes[number] for number in group) <= GROUP
