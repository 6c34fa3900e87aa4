"""Byte ranges: intervals of bytes, joined, cut and compared."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

ALIGN = 256
"""Bytes: each tensor starts on such a boundary (64 float32 elements)."""


@dataclass(frozen=True, kw_only=True)
class ByteRange:
    """A run of bytes of the state segment."""

    offset: int
    nbytes: int


def merge_ranges(ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """Sort and join ranges that touch, or that only a tensor's padding separates."""
    merged: list[ByteRange] = []
    for item in sorted(ranges, key=lambda r: r.offset):
        if merged:
            end = merged[-1].offset + merged[-1].nbytes
            if item.offset in (end, math.ceil(end / ALIGN) * ALIGN):
                last = merged.pop()
                item = ByteRange(offset=last.offset, nbytes=item.offset + item.nbytes - last.offset)
        merged.append(item)
    return merged


def cut_evenly(whole: ByteRange, parts: int) -> list[ByteRange]:
    """A range in so many parts of about the same size, cut where no number is."""
    lines = math.ceil(whole.nbytes / ALIGN)
    edges = [min(lines * part // parts * ALIGN, whole.nbytes) for part in range(parts + 1)]
    return [
        ByteRange(offset=whole.offset + start, nbytes=stop - start)
        for start, stop in itertools.pairwise(edges)
    ]


def overlap(one: ByteRange, other: ByteRange) -> ByteRange:
    """What two ranges have in common; of no bytes, if that is nothing."""
    start = max(one.offset, other.offset)
    stop = min(one.offset + one.nbytes, other.offset + other.nbytes)
    return ByteRange(offset=start, nbytes=max(0, stop - start))


def complement(nbytes: int, ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """What of so many bytes is in none of the ranges."""
    found, start = [], 0
    for item in merge_ranges(ranges):
        if item.offset > start:
            found.append(ByteRange(offset=start, nbytes=item.offset - start))
        start = item.offset + item.nbytes
    if start < nbytes:
        found.append(ByteRange(offset=start, nbytes=nbytes - start))
    return found
