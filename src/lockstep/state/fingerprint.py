"""Fingerprint: digests of a run's state, of each tensor and of all of them as one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from lockstep.planning.memory_layout import Entry, Layout
from lockstep.system.shared_memory import Segment

Buffer = bytes | bytearray | memoryview


_WORDS: dict[int, npt.DTypeLike] = {
    1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128
}  # fmt: skip
_SIZES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int16": 2,
    "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16, "uint16": 2, "uint32": 4,
    "uint64": 8,
}  # fmt: skip


def entry_array(entry: Entry, state: memoryview) -> npt.NDArray[Any]:
    """A tensor of the state as an array of words of its element size, in its own shape."""
    count = int(np.prod(entry.shape, dtype=np.int64))
    size = _SIZES.get(entry.dtype) or entry.nbytes // max(count, 1)
    flat: npt.NDArray[Any] = np.frombuffer(state, _WORDS[size], count=count, offset=entry.offset)
    return np.lib.stride_tricks.as_strided(
        flat, entry.shape, [stride * size for stride in entry.stride], writeable=True
    )


def tensor_digest(entry: Entry, state: memoryview) -> str:
    """The digest of one tensor: its name, type, shape, and bytes in row-major order."""
    digest = blake3(f"{entry.kind}\0{entry.name}\0{entry.dtype}\0{entry.shape}\0".encode())
    digest.update(np.ascontiguousarray(entry_array(entry, state)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def tensor_digests(layout: Layout, state: Segment | Buffer) -> dict[str, str]:
    """The digest of every tensor of the state segment, or of a copy of it."""
    if isinstance(state, Segment) and state.resident_bytes < state.nbytes:
        return {
            entry.name: tensor_digest(
                replace(entry, offset=0), memoryview(state.peek(entry.offset, entry.nbytes))
            )
            for entry in layout.entries
        }
    view = memoryview(state.map if isinstance(state, Segment) else state)
    return {entry.name: tensor_digest(entry, view) for entry in layout.entries}


def fingerprint(digests: Mapping[str, str]) -> str:
    """One digest over all tensors: parameters, buffers and optimizer state, by name."""
    whole = blake3()
    for name in sorted(digests):
        whole.update(f"{name}\0{digests[name]}\n".encode())
    return whole.hexdigest()


_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000, "float64": 0x7FF << 52}


def non_finite_tensors(layout: Layout, state: bytes | memoryview) -> list[str]:
    """Names of the parameters that hold a NaN or an infinity."""
    view = memoryview(state)
    found = []
    for entry in layout.entries:
        mask = _EXPONENT.get(entry.dtype)
        if mask is not None and entry.kind == "param":
            words = entry_array(entry, view)
            exponent = words.dtype.type(mask)
            if bool(np.any((words & exponent) == exponent)):
                found.append(entry.name)
    return found
