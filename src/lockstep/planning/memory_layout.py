"""Memory layout: where every tensor of a run is in shared memory. Pure arithmetic.

Three segments per host:

    state    parameters, buffers, optimizer state: what a checkpoint holds and a fingerprint covers
    slots    one gradient slot and one buffer slot per shard
    control  progress counters, the lease, the ring buffer of step records

A parameter is updated in *blocks*: runs of at most `BLOCK` elements, cut at fixed places that
depend on the model alone. An owner updates whole blocks, so no kernel ever sees a boundary that
moves with the number of workers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, Literal

from lockstep.planning.blocks import Block
from lockstep.planning.byte_ranges import ALIGN, ByteRange, merge_ranges

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
class Piece:
    """Part of an entry: some of its elements along one dimension."""

    entry: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class JoinedTensor:
    """A tensor of the module's state dict that lies in slices: the pieces, one after the other."""

    key: str
    dim: int
    pieces: tuple[Piece, ...]


class Allocator:
    """Hands out aligned byte offsets."""

    def __init__(self) -> None:
        self.used = 0

    def allocate(self, nbytes: int) -> int:
        offset = self.used
        self.used += math.ceil(nbytes / ALIGN) * ALIGN
        return offset


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
    joined: tuple[JoinedTensor, ...] = ()
    """The rest of the state dict, where matrices are cut into slices."""

    def entry(self, name: str) -> Entry:
        """The tensor of this name."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}

    def ranges_of(self, params: Container[int], kinds: Container[Kind]) -> list[ByteRange]:
        """The bytes of the state segment that are these trainable parameters', of such kinds."""
        return merge_ranges(
            ByteRange(offset=entry.offset, nbytes=entry.nbytes)
            for entry in self.entries
            if entry.kind in kinds and self.param_of.get(entry.name) in params
        )

    def apart(self, kind: Kind, numbers: Container[int]) -> list[ByteRange]:
        """The bytes of the state segment that hold what these groups have left out, or what these
        shards' optimizers keep."""
        return merge_ranges(
            ByteRange(offset=entry.offset, nbytes=entry.nbytes)
            for entry in self.entries
            if entry.kind == kind and int(entry.name.split("/")[1]) in numbers
        )

    @functools.cached_property
    def param_of(self) -> dict[str, int]:
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
            joined=tuple(
                JoinedTensor(
                    key=each["key"],
                    dim=each["dim"],
                    pieces=tuple(Piece(**piece) for piece in each["pieces"]),
                )
                for each in message.get("joined", ())
            ),
        )
