"""Slot map: gradients gathered in buckets, each once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lockstep.planning.byte_ranges import ByteRange
from lockstep.planning.slot_map import fill_buckets


@given(st.lists(st.integers(1, 400_000), min_size=1, max_size=30), st.sets(st.integers(0, 29)))
def test_buckets_have_every_gradient_once(sizes: list[int], tables: set[int]) -> None:
    places, offset = {}, 0
    for index, size in enumerate(sizes):
        if index not in tables:
            places[index] = ByteRange(offset=offset, nbytes=4 * size)
        offset += -(-4 * size // 256) * 256
    buckets = fill_buckets(places)
    assert sorted(param for bucket in buckets for param in bucket.params) == sorted(places)
    for bucket in buckets:
        assert list(bucket.params) == sorted(bucket.params, reverse=True)
        low, high = places[bucket.params[-1]], places[bucket.params[0]]
        assert bucket.byte_range == ByteRange(
            offset=low.offset, nbytes=high.offset + high.nbytes - low.offset
        )
        assert not any(low.offset <= places[t].offset < high.offset for t in tables & places.keys())
