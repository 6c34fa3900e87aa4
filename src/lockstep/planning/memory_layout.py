"""Where every tensor of a run lies in shared memory, and who may cut it where: pure arithmetic.

Three segments per host:

    state    parameters, buffers, optimizer state: what a checkpoint holds and a fingerprint covers
    slots    one gradient slot and one buffer slot per shard
    control  progress counters, the lease, the ring of step records (see `control`)

A parameter is updated in *blocks*: runs of at most `BLOCK` elements, cut at fixed places that
depend on the model alone. An owner updates whole blocks, so no kernel ever sees a boundary that
moves with the number of workers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

ALIGN = 256
"""Bytes: each tensor starts on such a boundary (64 float32 elements)."""
BLOCK = 1 << 16
"""Elements: the smallest size at which a tensor is cut into blocks."""
TARGET_BLOCKS = 128
"""A model is cut into about so many blocks, so that up to a few dozen owners share evenly."""
SPARSE_BLOCKS = 8
"""A table whose optimizer takes sparse gradients is cut into so many at most: an update costs by
the call and by the rows that it touches, whatever the size of the block."""

Kind = Literal["param", "buffer", "optim", "flag", "residual", "local"]
"""`residual` is what a group of shards has left out, `local` what a shard's own optimizer keeps."""
APART: frozenset[Kind] = frozenset({"residual", "local"})
"""What only the host has that computes the group or the shard."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor in the state segment."""

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int


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


class Allocator:
    """Hands out aligned byte offsets."""

    def __init__(self) -> None:
        self.used = 0

    def take(self, nbytes: int) -> int:
        offset = self.used
        self.used += math.ceil(nbytes / ALIGN) * ALIGN
        return offset


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


def own_blocks(blocks: Sequence[Block], workers: int) -> list[range]:
    """Give each rank a consecutive run of blocks of about the same number of elements."""
    total = sum(block.size for block in blocks) or 1
    owners: list[int] = []
    before = 0
    for block in blocks:
        owners.append(min((2 * before + block.size) * workers // (2 * total), workers - 1))
        before += block.size
    runs = []
    start = 0
    for rank in range(workers):
        stop = start + owners.count(rank)
        runs.append(range(start, stop))
        start = stop
    return runs


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


@dataclass(frozen=True, kw_only=True)
class Range:
    """A run of bytes of the state segment."""

    offset: int
    nbytes: int


def merge_ranges(ranges: Iterable[Range]) -> list[Range]:
    """Sort and join ranges that touch, or that only a tensor's padding separates."""
    merged: list[Range] = []
    for item in sorted(ranges, key=lambda r: r.offset):
        if merged:
            end = merged[-1].offset + merged[-1].nbytes
            if item.offset in (end, math.ceil(end / ALIGN) * ALIGN):
                last = merged.pop()
                item = Range(offset=last.offset, nbytes=item.offset + item.nbytes - last.offset)
        merged.append(item)
    return merged


def cut_evenly(place: Range, parts: int) -> list[Range]:
    """A range in so many parts of about the same size, cut where no number is."""
    lines = math.ceil(place.nbytes / ALIGN)
    edges = [min(lines * part // parts * ALIGN, place.nbytes) for part in range(parts + 1)]
    return [
        Range(offset=place.offset + start, nbytes=stop - start)
        for start, stop in itertools.pairwise(edges)
    ]


def overlap(one: Range, other: Range) -> Range:
    """What two ranges have in common; of no bytes, if that is nothing."""
    start = max(one.offset, other.offset)
    stop = min(one.offset + one.nbytes, other.offset + other.nbytes)
    return Range(offset=start, nbytes=max(0, stop - start))


def complement(nbytes: int, ranges: Iterable[Range]) -> list[Range]:
    """What of so many bytes is in none of the ranges."""
    found, start = [], 0
    for item in merge_ranges(ranges):
        if item.offset > start:
            found.append(Range(offset=start, nbytes=item.offset - start))
        start = item.offset + item.nbytes
    if start < nbytes:
        found.append(Range(offset=start, nbytes=nbytes - start))
    return found


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A run of bytes of the state segment that is digested as one."""

    name: str
    offset: int
    nbytes: int
    param: int | None
    """The trainable parameter that it is of, or of whose optimizer state."""


PARTS = 256
"""A state is cut into about so many digest units, as long as they are of a sensible size."""
UNIT_BYTES = (4 << 10, 128 << 10)
"""Bytes: the least and the largest size of a digest unit."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Which units the ledger records after each step: a rolling sample of the state.

    A step records one unit of the trainable parameters and one of everything else, in turn,
    so that a change of any parameter shows at once or at the next step's losses, and every byte
    is looked at again and again at a cost that does not grow with the model.
    """

    params: tuple[Unit, ...]
    others: tuple[Unit, ...]
    every: int
    """Only every so many steps: a small model's steps are too short for a digest each."""

    def units(self, step: int) -> tuple[Unit, ...]:
        """The units that the ledger records for `step`."""
        turn, left = divmod(step, self.every)
        if left:
            return ()
        return tuple(group[turn % len(group)] for group in (self.params, self.others) if group)

    def split(self, step: int, params: Container[int]) -> tuple[dict[int, Unit], dict[int, Unit]]:
        """The units of `step`, by their places in it: those of these parameters, and all others.

        Whoever alone updates some parameters, alone has their optimizer state: it digests the
        units of theirs, and every host digests those that nobody has alone.
        """
        apart: dict[int, Unit] = {}
        others: dict[int, Unit] = {}
        for place, unit in enumerate(self.units(step)):
            mine = unit.param is not None and unit.param in params
            (apart if mine else others)[place] = unit
        return apart, others


SMALL_STATE, SMALL_EVERY = 1 << 20, 8
PER_STEP = 2
"""The largest number of units that a step records."""


def plan_audit(entries: Iterable[Entry], owners: Mapping[str, int]) -> Audit:
    """Cut the state into digest units. `owners` are the trainable parameters of the entries."""
    entries = list(entries)
    total = sum(entry.nbytes for entry in entries)
    least, most = UNIT_BYTES
    length = min(max(math.ceil(total / PARTS / ALIGN) * ALIGN, least), most)
    params: list[Unit] = []
    others: list[Unit] = []
    for entry in entries:
        if entry.kind in APART:
            continue  # losses would show that it has changed
        param = owners.get(entry.name)
        mine = params if entry.kind == "param" and param is not None else others
        parts = max(1, math.ceil(entry.nbytes / length))
        for part in range(parts):
            start, stop = part * length, min((part + 1) * length, entry.nbytes)
            label = entry.name if parts == 1 else f"{entry.name}[{part}/{parts}]"
            offset = entry.offset + start
            nbytes = stop - start
            mine.append(Unit(name=label, offset=offset, nbytes=nbytes, param=param))
    every = 1 if total >= SMALL_STATE else SMALL_EVERY
    return Audit(params=tuple(params), others=tuple(others), every=every)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything that a process without the model needs in order to read the segments."""

    entries: tuple[Entry, ...]
    blocks: tuple[Block, ...]
    trainable: tuple[str, ...]
    state_bytes: int
    slots_bytes: int
    exported: tuple[tuple[str, str], ...]
    """The module's state dict: `(key, entry)`; tied tensors appear under each of their keys."""

    def audit(self) -> Audit:
        return plan_audit(self.entries, self._params)

    def ranges_of(self, params: Container[int], kinds: Container[Kind]) -> list[Range]:
        """The bytes of the state segment that are these trainable parameters', of such kinds."""
        return merge_ranges(
            Range(offset=entry.offset, nbytes=entry.nbytes)
            for entry in self.entries
            if entry.kind in kinds and self._params.get(entry.name) in params
        )

    def apart(self, kind: Kind, numbers: Container[int]) -> list[Range]:
        """The bytes of the state segment that hold what these groups have left out, or what these
        shards' optimizers keep."""
        return merge_ranges(
            Range(offset=entry.offset, nbytes=entry.nbytes)
            for entry in self.entries
            if entry.kind == kind and int(entry.name.split("/")[1]) in numbers
        )

    @functools.cached_property
    def _params(self) -> dict[str, int]:
        """By entry, the trainable parameter that it is, or whose optimizer state it is."""
        numbers = {name: number for number, name in enumerate(self.trainable)}
        found = {}
        for entry in self.entries:
            name = entry.name if entry.kind in ("param", "optim") else ""
            while name and name not in numbers:  # a parameter's state begins with its name
                name = name.rpartition("/")[0]
            if name:
                found[entry.name] = numbers[name]
        return found

    def to_message(self) -> dict[str, Any]:
        """JSON-ready."""
        from dataclasses import asdict

        return asdict(self)

    @staticmethod
    def from_message(message: dict[str, Any]) -> Layout:
        entries = tuple(
            Entry(**{**e, "shape": tuple(e["shape"]), "stride": tuple(e["stride"])})
            for e in message["entries"]
        )
        return Layout(
            entries=entries,
            blocks=tuple(Block(**block) for block in message["blocks"]),
            trainable=tuple(message["trainable"]),
            state_bytes=message["state_bytes"],
            slots_bytes=message["slots_bytes"],
            exported=tuple((key, entry) for key, entry in message["exported"]),
        )
