"""Byte ranges: merged without losing or adding a byte but padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lockstep.planning.byte_ranges import ALIGN, ByteRange, merge_ranges


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
