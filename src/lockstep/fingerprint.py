"""Digests of a run's state: of each tensor, and of all of them as one fingerprint."""

from __future__ import annotations

from collections.abc import Mapping

from blake3 import blake3

from lockstep.layout import Entry, Layout
from lockstep.memory import Segment

Buffer = bytes | bytearray | memoryview


def tensor_digest(entry: Entry, state: memoryview) -> str:
    """The digest of one tensor: its name, type, shape and bytes."""
    digest = blake3(f"{entry.kind}\0{entry.name}\0{entry.dtype}\0{entry.shape}\0".encode())
    digest.update(state[entry.offset : entry.offset + entry.nbytes])
    return digest.hexdigest()


def tensor_digests(layout: Layout, state: Segment | Buffer) -> dict[str, str]:
    """The digest of every tensor of the state segment, or of a copy of it."""
    view = memoryview(state.map if isinstance(state, Segment) else state)
    return {entry.name: tensor_digest(entry, view) for entry in layout.entries}


def fingerprint(digests: Mapping[str, str]) -> str:
    """One digest over all tensors: parameters, buffers and optimizer state, by name."""
    whole = blake3()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]}\n".encode())
    return whole.hexdigest()
