"""Shown tensors: tensors in a buffer of shared memory that grows, with what says how to read them.

    kind, bytes used, count; then of each tensor: type, layout, dimensions, sizes, strides; data

Sums and joins are made of what is read here, never computed with as it is: kernels whose results
may depend on where a tensor lies meet none of it.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.system.machine import available_bytes, not_enough_memory

ALIGN = 64
_HEAD = struct.Struct("=3q")
_DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
_NUMBERS = {dtype: number for number, dtype in enumerate(_DTYPES)}
_ABSENT = -1
"""In the place of a type: there is no tensor, as where autograd has no gradient."""


class Buffer:
    """A file of shared memory, mapped as far as it is needed."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map_all()

    def grow(self, nbytes: int) -> None:
        """Have room for so many bytes. Called by the writer.

        Raises:
            ResourceError: there is not that much memory.
        """
        if nbytes <= len(self.map):
            return
        size = 1 << (nbytes - 1).bit_length()
        try:
            os.posix_fallocate(self.fd, 0, size)
        except OSError as error:
            raise not_enough_memory("a team's board", size, available_bytes()) from error
        self._map_all()

    def see(self, nbytes: int) -> None:
        """See so many bytes, which the writer has made room for."""
        if nbytes > len(self.map):
            self._map_all()

    def _map_all(self) -> None:
        self.map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What lies in a buffer."""

    kind: int
    tensors: list[torch.Tensor | None]
    """Views of the buffer."""


def write_tensors(buffer: Buffer, kind: int, tensors: Sequence[torch.Tensor | None]) -> None:
    """Copy tensors into a buffer, which grows as it has to."""
    heads, used = [], _HEAD.size
    for tensor in tensors:
        head = _described(tensor)
        data = _aligned(used + len(head) * 8)
        heads.append((used, head, data))
        used = data if tensor is None else data + tensor.numel() * tensor.dtype.itemsize
        used = _aligned(used)
    buffer.grow(used)
    _HEAD.pack_into(buffer.map, 0, kind, used, len(tensors))
    for tensor, (at, head, data) in zip(tensors, heads, strict=True):
        struct.pack_into(f"={len(head)}q", buffer.map, at, *head)
        if tensor is not None:
            _view(buffer, data, tensor.dtype, head[2:]).copy_(tensor)


def read_tensors(buffer: Buffer) -> Shown:
    """The tensors that lie in a buffer."""
    kind, used, count = _HEAD.unpack_from(buffer.map, 0)
    buffer.see(used)
    tensors: list[torch.Tensor | None] = []
    at = _HEAD.size
    for _ in range(count):
        number, ndim = struct.unpack_from("=2q", buffer.map, at)
        form = struct.unpack_from(f"={2 * ndim}q", buffer.map, at + 16)
        data = _aligned(at + 16 + 16 * ndim)
        if number == _ABSENT:
            tensors.append(None)
            at = data
            continue
        dtype = _DTYPES[number]
        tensors.append(_view(buffer, data, dtype, form))
        at = _aligned(data + math.prod(form[:ndim]) * dtype.itemsize)
    return Shown(kind=kind, tensors=tensors)


def _described(tensor: torch.Tensor | None) -> tuple[int, ...]:
    """Type, dimensions, sizes, and the strides of a dense tensor in the same order of elements: a
    sum of tensors has that order."""
    if tensor is None:
        return (_ABSENT, 0)
    stride = tensor.stride()
    if not tensor.is_contiguous():
        stride = torch.empty_like(tensor, device="meta").stride()
    return (_NUMBERS[tensor.dtype], tensor.dim(), *tensor.shape, *stride)


def _view(buffer: Buffer, offset: int, dtype: torch.dtype, form: Sequence[int]) -> torch.Tensor:
    size, stride = tuple(form[: len(form) // 2]), tuple(form[len(form) // 2 :])
    nbytes = math.prod(size) * dtype.itemsize
    return buffer.bytes[offset : offset + nbytes].view(dtype).as_strided(size, stride)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
