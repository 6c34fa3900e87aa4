"""Gradient slots: a shard's gradients in shared memory, and what it left in the buffers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lockstep.planning.byte_ranges import ALIGN, ByteRange, merge_ranges
from lockstep.planning.slot_map import SlotMap, TableMap
from lockstep.state.embedding_tables import Table, TableGradient


@dataclass
class GradientSlot:
    """The shared tensors of one shard: a gradient per trainable parameter, and the buffers."""

    grads: list[torch.Tensor]
    buffers: list[torch.Tensor]
    row_indices: dict[int, torch.Tensor]
    """Of a gradient that is a large table's: which rows there are (see `embedding_tables`)."""
    local: torch.Tensor
    """Bytes: what the shard's own optimizer keeps (see `optim.local_rounds`)."""
    flat: torch.Tensor
    """The slot's bytes."""

    def table(self, index: int) -> TableGradient:
        """The gradient of a large table."""
        return TableGradient(self.grads[index], self.row_indices[index])

    def dense(self, index: int) -> torch.Tensor:
        """A gradient in its parameter's shape."""
        if index in self.row_indices:
            return self.table(index).dense(0, len(self.grads[index]))
        return self.grads[index]


def make_slot(
    flat: torch.Tensor,
    params: Sequence[nn.Parameter],
    offsets: Sequence[int],
    buffers: Sequence[torch.Tensor],
    tables: Mapping[int, Table],
    local: ByteRange,
) -> GradientSlot:
    """The views of a slot's bytes. `offsets` says where each parameter's gradient lies, `local`
    where what the shard's own optimizer keeps."""
    grads = []
    for parameter, offset in zip(params, offsets, strict=True):
        dtype = str(parameter.dtype).removeprefix("torch.")
        grads.append(as_tensor(flat, offset, dtype, parameter.shape, parameter.stride()))
    last = params[-1]
    offset = _aligned(offsets[-1] + last.numel() * last.dtype.itemsize)
    left = []
    for buffer in buffers:
        dtype = str(buffer.dtype).removeprefix("torch.")
        left.append(as_tensor(flat, offset, dtype, buffer.shape, buffer.stride()))
        offset += _aligned(buffer.numel() * buffer.dtype.itemsize)
    row_indices = {}
    for index, table in tables.items():
        count = 1 + table.rows
        row_indices[index] = as_tensor(flat, offset, "int64", (count,), (1,))
        offset += _aligned(8 * count)
    kept = flat[local.offset : local.offset + local.nbytes]
    return GradientSlot(grads=grads, buffers=left, row_indices=row_indices, local=kept, flat=flat)


def _aligned(nbytes: int) -> int:
    return math.ceil(nbytes / ALIGN) * ALIGN


def map_slot(
    slot: GradientSlot,
    tables: Mapping[int, Table],
    packed: ByteRange,
    total: int,
    restored: int,
    slice_of: Mapping[int, int],
) -> SlotMap:
    """What of a slot other hosts get. `total` and `restored` are indices of slots; `slice_of` says
    which slice a parameter is."""
    start = slot.flat.data_ptr()

    def range_of(tensor: torch.Tensor) -> ByteRange:
        nbytes = tensor.numel() * tensor.dtype.itemsize
        return ByteRange(offset=tensor.data_ptr() - start, nbytes=nbytes)

    dense = {index: range_of(grad) for index, grad in enumerate(slot.grads) if index not in tables}
    table_maps = [
        TableMap(
            rows=range_of(slot.grads[index]),
            row_bytes=table.width * slot.grads[index].dtype.itemsize,
            row_indices=range_of(slot.row_indices[index]),
        )
        for index, table in tables.items()
    ]
    buffers = merge_ranges(map(range_of, slot.buffers)) or [ByteRange(offset=0, nbytes=0)]
    return SlotMap(
        nbytes=slot.flat.numel(),
        grads=dense,
        tables=tuple(table_maps),
        buffers=buffers[0],
        packed=packed,
        total=total,
        restored=restored,
        slice_of=slice_of,
    )


def as_tensor(
    flat: torch.Tensor, offset: int, dtype: str, shape: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """A typed, shaped view into a tensor of bytes. `stride` is in elements."""
    kind: torch.dtype = getattr(torch, dtype)
    nbytes = math.prod(shape) * kind.itemsize
    return flat[offset : offset + nbytes].view(kind).as_strided(tuple(shape), tuple(stride))
