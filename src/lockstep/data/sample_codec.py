"""One sample as bytes: the length of its tree in 4 bytes, the tree in JSON, then its arrays.

In the tree, what JSON has stands for itself, but for lists, which begin with what they are:

    ["tuple", x...] ["list", x...] ["dict", [key, x]...] ["bytes", length]
    ["tensor", dtype, shape, order] ["array", dtype, shape, order] ["number", dtype]

The bytes of an array lie in the order of its strides, so that it is read back with the same ones.
Types are compared, not asked for what they derive from: what comes back is what was there.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lockstep.errors import DataError
from lockstep.system.dtypes import STORED

Tree = Any
"""What JSON can hold."""
LENGTH = struct.Struct("<I")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*STORED, torch.complex128)}
PLAIN = (type(None), bool, int, float, str)
KINDS = "biufcSUMm"
"""Of NumPy's types: numbers, texts of fixed length, times."""


def pack_sample(sample: Any) -> list[bytes | memoryview]:
    """The bytes of a sample, in pieces.

    Raises:
        DataError: it holds something else; `what` and `found` say what and where.
    """
    arrays: list[bytes | memoryview] = []
    tree = json.dumps(_pack(sample, "", arrays)).encode()
    return [LENGTH.pack(len(tree)), tree, *arrays]


def unpack_sample(content: memoryview) -> Any:
    """The sample in these bytes; its arrays are copies. Raises ValueError and the like if none."""
    (size,) = LENGTH.unpack(content[: LENGTH.size])
    start = LENGTH.size + size
    return _Unpacking(content[start:]).value(json.loads(bytes(content[LENGTH.size : start])))


def pack_tensor(tensor: torch.Tensor) -> tuple[Tree, memoryview]:
    """A tensor's description in a tree, and its bytes.

    Raises:
        DataError: it is not a plain one.
    """
    name = str(tensor.dtype).removeprefix("torch.")
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided
    if not plain or tensor.device.type != "cpu" or tensor.requires_grad or name not in DTYPES:
        raise DataError("it holds a tensor that is not plain", found=_describe(tensor))
    order = _order(tensor.stride())
    dense = tensor.resolve_conj().resolve_neg().permute(order).contiguous()
    content = dense.reshape(-1).view(torch.uint8).numpy().data
    return ["tensor", name, list(tensor.shape), order], content


def unpack_tensor(tree: Tree, content: memoryview) -> torch.Tensor:
    """The tensor of a tree, over the first of these bytes. It shares their memory."""
    nbytes = _nbytes(tree)
    if not nbytes:
        return _shaped(tree, torch.empty(0, dtype=torch.uint8))
    return _shaped(tree, torch.frombuffer(content, dtype=torch.uint8, count=nbytes))


def _nbytes(tree: Tree) -> int:
    return int(math.prod(tree[2])) * DTYPES[tree[1]].itemsize


def _shaped(tree: Tree, flat: torch.Tensor) -> torch.Tensor:
    _, name, shape, order = tree
    permuted = flat.view(DTYPES[name]).reshape([shape[axis] for axis in order])
    return permuted.permute(_inverse(order))


def _pack(value: Any, path: str, arrays: list[bytes | memoryview]) -> Tree:
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind in (tuple, list):
        inner = [_pack(each, f"{path}[{index}]", arrays) for index, each in enumerate(value)]
        return [kind.__name__, *inner]
    if kind is dict:
        for key in value:
            if type(key) not in (str, int):
                raise DataError(
                    f"it has a key of type {type(key).__name__}", found=path or "itself"
                )
        items = [[key, _pack(each, f"{path}[{key!r}]", arrays)] for key, each in value.items()]
        return ["dict", *items]
    if kind is bytes:
        arrays.append(value)
        return ["bytes", len(value)]
    if isinstance(value, torch.Tensor):
        tree, content = pack_tensor(value)
        arrays.append(content)
        return tree
    if kind in (np.ndarray, np.memmap) and value.dtype.kind in KINDS:
        order = _order(value.strides)
        arrays.append(np.ascontiguousarray(value.transpose(order)).tobytes())
        return ["array", value.dtype.str, list(value.shape), order]
    if isinstance(value, np.generic) and value.dtype.kind in KINDS:
        arrays.append(value.tobytes())
        return ["number", value.dtype.str]
    what = f"it holds a {kind.__module__}.{kind.__qualname__}"
    raise DataError(what, found=f"{ascii(value)[:100]}, at {path or 'its top'}")


class _Unpacking:
    """Takes arrays from the bytes behind a tree, one after the other."""

    def __init__(self, content: memoryview) -> None:
        self._content, self._at = content, 0

    def value(self, tree: Tree) -> Any:
        if not isinstance(tree, list):
            return tree
        kind, *rest = tree
        match kind:
            case "tuple":
                return tuple(map(self.value, rest))
            case "list":
                return list(map(self.value, rest))
            case "dict":
                return {key: self.value(inner) for key, inner in rest}
            case "bytes":
                return bytes(self._take(rest[0]))
            case "tensor":
                content = self._take(_nbytes(tree))
                flat = torch.empty(len(content), dtype=torch.uint8)  # aligned, as torch's own are
                flat.numpy()[:] = np.frombuffer(content, np.uint8)
                return _shaped(tree, flat)
            case "array":
                name, shape, order = rest
                flat = self._array(name, math.prod(shape))
                return flat.reshape([shape[axis] for axis in order]).transpose(_inverse(order))
            case "number":
                return self._array(rest[0], 1)[0]
        raise ValueError(f"an unknown kind {kind!r}")

    def _array(self, name: str, count: int) -> Any:
        dtype = np.dtype(name)
        return np.frombuffer(self._take(count * dtype.itemsize), dtype, count).copy()

    def _take(self, nbytes: int) -> memoryview:
        self._at += nbytes
        content = self._content[self._at - nbytes : self._at]
        if len(content) != nbytes:
            raise ValueError("an array is cut short")
        return content


def _order(strides: Sequence[int]) -> list[int]:
    """The axes, the one with the longest stride first."""
    return sorted(range(len(strides)), key=lambda axis: -abs(strides[axis]))


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=lambda index: order[index])


def _describe(tensor: torch.Tensor) -> str:
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    grad = ", with a gradient" if tensor.requires_grad else ""
    return f"{kind}, {tensor.dtype}, {tensor.layout}, on {tensor.device}{grad}"
