"""Exported tensors: the plain module's state dict, read from the state and written to it.

Where matrices are cut into slices, a tensor of the state dict is joined from several entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lockstep.planning.memory_layout import Entry, JoinedTensor, Layout
from lockstep.state.fingerprint import entry_array


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedTensor:
    """A tensor of the state dict. Nothing of the state is looked at until it is read or written."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    dim: int
    """Along which its pieces lie."""
    pieces: Sequence[tuple[Entry, int, int]]
    """Parts of entries along the dimension, one after the other."""
    state: memoryview

    @property
    def entries(self) -> set[str]:
        """The names of those that hold it."""
        return {entry.name for entry, _, _ in self.pieces}

    @property
    def joined_bytes(self) -> int:
        """How much `read` joins, and takes memory for; 0 where it lies in one piece."""
        views = self._views()
        return sum(view.nbytes for view in views) if len(views) > 1 else 0

    def read(self, room: memoryview | None = None) -> npt.NDArray[Any]:
        """The tensor row by row, as words of the element size. `room`: where it is joined, if it
        is; by default in memory of its own."""
        views = self._views()
        if len(views) == 1:
            return np.ascontiguousarray(views[0])
        if room is None:
            return np.concatenate(views, self.dim)
        out = np.frombuffer(room, views[0].dtype).reshape(self.shape)
        return np.concatenate(views, self.dim, out=out)

    def write(self, data: bytes) -> None:
        """Put a tensor of this shape into the state, given as bytes row by row."""
        views = self._views()
        whole = np.frombuffer(data, views[0].dtype).reshape(self.shape)
        if len(views) == 1:
            views[0][...] = whole
            return
        edges = np.cumsum([view.shape[self.dim] for view in views])
        for view, part in zip(views, np.split(whole, edges[:-1], self.dim), strict=True):
            view[...] = part

    def _views(self) -> list[npt.NDArray[Any]]:
        if len(self.pieces) == 1:  # a whole entry: slices are two or more
            return [entry_array(self.pieces[0][0], self.state)]
        before = (slice(None),) * self.dim
        return [
            entry_array(entry, self.state)[(*before, slice(start, stop))]
            for entry, start, stop in self.pieces
        ]


def exported_tensors(layout: Layout, state: memoryview) -> Iterator[ExportedTensor]:
    """The tensors of the state dict, in the state or a copy of it."""
    by_name = {entry.name: entry for entry in layout.entries}
    for key, name in layout.exported:
        yield entry_tensor(key, by_name[name], state)
    for joined in layout.joined:
        yield _joined(joined, [by_name[piece.entry] for piece in joined.pieces], state)


def entry_tensor(key: str, entry: Entry, state: memoryview) -> ExportedTensor:
    """What one entry holds, under another name."""
    return ExportedTensor(
        key=key, dtype=entry.dtype, shape=entry.shape, dim=0, pieces=[(entry, 0, 0)], state=state
    )


def _joined(joined: JoinedTensor, entries: Sequence[Entry], state: memoryview) -> ExportedTensor:
    shape = list(entries[0].shape)
    shape[joined.dim] = sum(piece.stop - piece.start for piece in joined.pieces)
    return ExportedTensor(
        key=joined.key, dtype=entries[0].dtype, shape=tuple(shape), dim=joined.dim,
        pieces=[(e, p.start, p.stop) for e, p in zip(entries, joined.pieces, strict=True)],
        state=state,
    )  # fmt: skip
