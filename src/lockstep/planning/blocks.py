"""Blocks: the parameters cut on a fixed grid, and the blocks' owners."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

BLOCK = 1 << 16
"""Elements: the smallest size at which a tensor is cut into blocks."""


TARGET_BLOCKS = 128
"""A model is cut into about so many blocks, so that up to a few dozen owners share evenly."""


SPARSE_BLOCKS = 8
"""A table whose optimizer takes sparse gradients is cut into so many at most: an update costs by
the call and by the rows that it touches, whatever the size of the block."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A run of one parameter that one owner updates.

    `param` is the index of the parameter among the trainable ones; `start` and `stop` are in
    elements of its storage order; `whole` says that the block is the entire tensor, which then
    keeps its shape.
    """

    param: int
    start: int
    stop: int
    whole: bool

    @property
    def size(self) -> int:
        return self.stop - self.start


def cut_blocks(
    sizes: Sequence[int],
    cuttable: Sequence[bool],
    widths: Mapping[int, int] | None = None,
    sparse: Container[int] = (),
) -> list[Block]:
    """Cut parameters of the given sizes (elements) into blocks, in order.

    `widths` are those of the tables that are to be cut between rows; `sparse` are those among them
    whose optimizer takes sparse gradients.
    """
    least = max(BLOCK, math.ceil(sum(sizes) / TARGET_BLOCKS))
    blocks = []
    for index, (size, may_cut) in enumerate(zip(sizes, cuttable, strict=True)):
        grid = math.lcm(64, widths[index]) if widths and index in widths else 4096
        wanted = max(least, math.ceil(size / SPARSE_BLOCKS)) if index in sparse else least
        length = math.ceil(wanted / grid) * grid
        if size <= length or not may_cut:
            blocks.append(Block(param=index, start=0, stop=size, whole=True))
            continue
        blocks += [
            Block(param=index, start=start, stop=min(start + length, size), whole=False)
            for start in range(0, size, length)
        ]
    return blocks


def divide_evenly(sizes: Sequence[int], workers: int) -> list[range]:
    """Give each rank a consecutive run of items, so that their sizes add up to about the same."""
    total = sum(sizes) or 1
    owners: list[int] = []
    before = 0
    for size in sizes:
        owners.append(min((2 * before + size) * workers // (2 * total), workers - 1))
        before += size
    runs = []
    start = 0
    for rank in range(workers):
        stop = start + owners.count(rank)
        runs.append(range(start, stop))
        start = stop
    return runs


def own_blocks(blocks: Sequence[Block], workers: int) -> list[range]:
    """Give each rank a consecutive run of blocks of about the same number of elements."""
    return divide_evenly([block.size for block in blocks], workers)


GROUP = 1 << 20
"""Elements: blocks are updated in groups of about this size: few calls, within the cache."""


def group_blocks(blocks: Sequence[Block], numbers: Sequence[int]) -> list[list[int]]:
    """Cut an owner's run of blocks into groups of at most `GROUP` elements, or one block."""
    groups: list[list[int]] = []
    size = 0
    for number in numbers:
        if not groups or size + blocks[number].size > GROUP:
            groups.append([])
            size = 0
        groups[-1].append(number)
        size += blocks[number].size
    return groups
