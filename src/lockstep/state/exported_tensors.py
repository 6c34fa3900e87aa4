"""Exported tensors: the plain module's state dict, read from the state and written to it.

Where matrices are cut into slices, a tensor of the state dict is joined from several entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lockstep.planning.memory_layout import JoinedTensor, Layout
from lockstep.state.fingerprint import entry_array


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedTensor:
    """A tensor of the state dict."""

    key: str
    entries: tuple[str, ...]
    """Those that hold it."""
    dtype: str
    shape: tuple[int, ...]
    dim: int
    """Along which its pieces lie."""
    pieces: Sequence[npt.NDArray[Any]]
    """Views of the state, as words of the element size."""

    def read(self) -> npt.NDArray[Any]:
        """The tensor, row by row."""
        if len(self.pieces) == 1:
            return np.ascontiguousarray(self.pieces[0])
        return np.ascontiguousarray(np.concatenate(self.pieces, self.dim))

    def write(self, data: bytes) -> None:
        """Put a tensor of this shape into the state, given as bytes row by row."""
        whole = np.frombuffer(data, self.pieces[0].dtype).reshape(self.shape)
        if len(self.pieces) == 1:
            self.pieces[0][...] = whole
            return
        edges = np.cumsum([piece.shape[self.dim] for piece in self.pieces])
        for piece, part in zip(self.pieces, np.split(whole, edges[:-1], self.dim), strict=True):
            piece[...] = part


def exported_tensors(layout: Layout, state: memoryview) -> Iterator[ExportedTensor]:
    """The tensors of the state dict, in the state or a copy of it."""
    for key, name in layout.exported:
        yield entry_tensor(layout, key, name, state)
    for joined in layout.joined:
        yield _joined(layout, joined, state)


def entry_tensor(layout: Layout, key: str, name: str, state: memoryview) -> ExportedTensor:
    """What one entry holds, under another name."""
    entry = layout.entry(name)
    return ExportedTensor(
        key=key, entries=(name,), dtype=entry.dtype, shape=entry.shape, dim=0,
        pieces=[entry_array(entry, state)],
    )  # fmt: skip


def _joined(layout: Layout, joined: JoinedTensor, state: memoryview) -> ExportedTensor:
    entries = [layout.entry(piece.entry) for piece in joined.pieces]
    pieces = []
    for entry, piece in zip(entries, joined.pieces, strict=True):
        within = (slice(None),) * joined.dim + (slice(piece.start, piece.stop),)
        pieces.append(entry_array(entry, state)[within])
    shape = list(entries[0].shape)
    shape[joined.dim] = sum(piece.shape[joined.dim] for piece in pieces)
    return ExportedTensor(
        key=joined.key, entries=tuple(dict.fromkeys(entry.name for entry in entries)),
        dtype=entries[0].dtype, shape=tuple(shape), dim=joined.dim, pieces=pieces,
    )  # fmt: skip
