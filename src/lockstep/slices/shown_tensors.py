"""Shown tensors: tensors in a buffer of shared memory that grows, with what says how to read them.

    kind, bytes used, count; origin; then of each tensor: type, dimensions, sizes, strides; data

Sums and joins are made of what is read here, never computed with as it is: kernels whose results
may depend on where a tensor lies meet none of it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.slices.board_memory import (
    ABSENT,
    CONTENT,
    HEAD_BYTES,
    ITEM_BYTES,
    ORIGIN,
    Buffer,
    TensorHead,
    aligned,
)

_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_NUMBERS = {dtype: number for number, dtype in enumerate(_DTYPES)}
assert tuple(dtype.itemsize for dtype in _DTYPES) == ITEM_BYTES
NOWHERE = (-1, -1, -1)
"""The origin of what is not shown yet."""


class TensorBuffer(Buffer):
    """A buffer whose bytes can be seen as tensors."""

    def remap(self) -> None:
        """The same, for tensors."""
        super().remap()
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What lies in a buffer."""

    kind: int
    tensors: list[torch.Tensor | None]
    """Views of the buffer."""


def write_tensors(
    buffer: TensorBuffer,
    kind: int,
    tensors: Sequence[torch.Tensor | None],
    origin: tuple[int, int, int] = NOWHERE,
) -> None:
    """Copy tensors into a buffer, which grows as it has to. `origin`: as `ORIGIN` says."""
    heads, used = [], HEAD_BYTES
    for tensor in tensors:
        head = _described(tensor)
        data = aligned(used + len(head) * 8)
        heads.append((used, head, data))
        used = data if tensor is None else data + tensor.numel() * tensor.dtype.itemsize
        used = aligned(used)
    buffer.grow(used)
    ORIGIN.pack_into(buffer.map, CONTENT.size, *NOWHERE)
    CONTENT.pack_into(buffer.map, 0, kind, used, len(tensors))
    for tensor, (at, head, data) in zip(tensors, heads, strict=True):
        struct.pack_into(f"={len(head)}q", buffer.map, at, *head)
        if tensor is not None:
            _view(buffer, data, tensor.dtype, head[2:]).copy_(tensor)
    ORIGIN.pack_into(buffer.map, CONTENT.size, *origin)


def read_tensors(buffer: TensorBuffer) -> Shown:
    """The tensors that lie in a buffer."""
    kind, used, count = CONTENT.unpack_from(buffer.map, 0)
    buffer.see(used)
    tensors: list[torch.Tensor | None] = []
    at = HEAD_BYTES
    for _ in range(count):
        head = TensorHead.at(buffer.map, at)
        absent = head.number == ABSENT
        tensors.append(
            None if absent else _view(buffer, head.data, _DTYPES[head.number], head.form)
        )
        at = head.end
    return Shown(kind=kind, tensors=tensors)


def _described(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """Type, dimensions, sizes, and the strides of a dense tensor in the same order of elements: a
    sum of tensors has that order."""
    if tensor is None:
        return (ABSENT, 0)
    stride = tensor.stride()
    if not tensor.is_contiguous():
        stride = torch.empty_like(tensor, device="meta").stride()
    return (_NUMBERS[tensor.dtype], tensor.dim(), *tensor.shape, *stride)


def _view(
    buffer: TensorBuffer, offset: int, dtype: torch.dtype, form: Sequence[int]
) -> torch.Tensor:
    size, stride = tuple(form[: len(form) // 2]), tuple(form[len(form) // 2 :])
    nbytes = math.prod(size) * dtype.itemsize
    return buffer.bytes[offset : offset + nbytes].view(dtype).as_strided(size, stride)
