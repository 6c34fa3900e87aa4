"""Tensor pickling: a task's pickle with the tensors as they share memory, and no more of it.

PyTorch pickles a view with all of its storage, and each view anew: a slice takes the whole tensor
along, and what shared memory does not share it afterwards. Here only the bytes that are looked at
are kept, once: views that overlap lie in one piece, others in pieces of their own.
"""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cloudpickle

if TYPE_CHECKING:
    import torch

ALIGN = 64
"""Bytes. Pieces begin where memory is aligned, since some kernels round differently elsewhere."""


def dumps(value: object, before: bytes = b"") -> bytes:
    """As `cloudpickle.dumps`, behind other bytes; to be read by `pickle.load`."""
    if "torch" not in sys.modules:
        return before + cloudpickle.dumps(value)  # type: ignore[no-any-return]
    looks = _Looks()
    _Pickler(_Nowhere(), looks.see).dump(value)
    file = io.BytesIO()
    file.write(before)
    _Pickler(file, _Pieces(looks).reduce).dump(value)
    return file.getvalue()


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
    """A pickler that asks `reduce` first: of tensors and storages in main memory."""

    def __init__(self, file: Any, reduce: Callable[[Any], Any]) -> None:
        super().__init__(file)
        self._reduce = reduce

    def reducer_override(self, obj: Any) -> Any:
        import torch

        kinds = (torch.Tensor, torch.UntypedStorage, torch.storage.TypedStorage)
        if isinstance(obj, kinds) and _untyped(obj).device.type == "cpu":
            found = self._reduce(obj)
            if found is not None:
                return found
        return super().reducer_override(obj)


class _Looks:
    """Which bytes of each storage are looked at."""

    def __init__(self) -> None:
        self.ranges: dict[int, list[tuple[int, int]]] = {}
        """By the storage's address."""
        self._seen: list[torch.UntypedStorage] = []
        """Kept, so that an address means one storage: some are made for the pickle alone, such as a
        generator's state."""

    def see(self, obj: Any) -> Any:
        """Note a tensor or storage; what a pickle has of it beside its memory."""
        import torch

        if isinstance(obj, torch.Tensor):
            reduced = _parts_of(obj)
            if reduced is None:
                return None
            self._note(_untyped(reduced[1][0]), *_span(obj))
            return reduced[2](None, 0)
        self._note(_untyped(obj), 0, _untyped(obj).nbytes())
        return (tuple, ())

    def _note(self, storage: torch.UntypedStorage, start: int, stop: int) -> None:
        if stop > start:
            self._seen.append(storage)
            self.ranges.setdefault(storage.data_ptr(), []).append((start, stop))


class _Pieces:
    """The pieces that the bytes looked at are made into, each pickled once."""

    def __init__(self, looks: _Looks) -> None:
        self._looks = looks
        self._spans = {address: _merged(ranges) for address, ranges in looks.ranges.items()}
        self._made: dict[tuple[int, int, int], _Piece] = {}

    def reduce(self, obj: Any) -> Any:
        """How a tensor or storage is made again of its piece."""
        import torch

        if not isinstance(obj, torch.Tensor):
            storage = _untyped(obj)
            if storage.data_ptr() not in self._spans:
                return None  # empty, or made for this pickle alone
            piece, _ = self._piece(storage, 0)
            dtype = obj.dtype if isinstance(obj, torch.storage.TypedStorage) else None
            return _storage_of, (piece, dtype)
        reduced = _parts_of(obj)
        if reduced is None or not obj.numel():
            return None
        _, (typed, *_), remade = reduced
        if _untyped(typed).data_ptr() not in self._spans:
            return None
        start, _ = _span(obj)
        piece, begin = self._piece(_untyped(typed), start)
        offset = obj.storage_offset() - begin // obj.dtype.itemsize
        return remade(_Typed(piece, typed.dtype), offset)

    def _piece(self, storage: torch.UntypedStorage, start: int) -> tuple[_Piece, int]:
        """The piece that has this byte of a storage, and which of its bytes that begins with."""
        address = storage.data_ptr()
        span = next(span for span in self._spans[address] if span[0] <= start < span[1])
        key = (address, *span)
        if key not in self._made:
            self._made[key] = _Piece(storage, *span)
        return self._made[key], span[0]


class _Piece:
    """A run of a storage's bytes. It becomes a storage."""

    def __init__(self, storage: torch.UntypedStorage, start: int, stop: int) -> None:
        self._storage, self._start, self._stop = storage, start, stop

    def __reduce__(self) -> Any:
        import torch

        whole = torch.empty(0, dtype=torch.uint8).set_(self._storage)
        piece: Any = whole.numpy()[self._start : self._stop]
        return _piece_from, (pickle.PickleBuffer(piece),)


class _Typed:
    """A piece as the storage of a type. It becomes a `TypedStorage`."""

    def __init__(self, piece: _Piece, dtype: torch.dtype) -> None:
        self._piece, self._dtype = piece, dtype

    def __reduce__(self) -> Any:
        return _storage_of, (self._piece, self._dtype)


def _piece_from(data: Any) -> torch.UntypedStorage:
    import torch

    return torch.empty(len(data), dtype=torch.uint8).copy_(
        torch.frombuffer(data, dtype=torch.uint8)
    ).untyped_storage()  # fmt: skip


def _storage_of(storage: torch.UntypedStorage, dtype: torch.dtype | None) -> Any:
    import torch

    if dtype is None:
        return storage
    return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _untyped(storage: Any) -> torch.UntypedStorage:
    untyped: torch.UntypedStorage = getattr(storage, "_untyped_storage", storage)
    return untyped


def _parts_of(tensor: torch.Tensor) -> Any:
    """`(rebuild, args, remade)` of a tensor that PyTorch pickles as a view of a storage, where
    `remade(storage, offset)` is the same of another storage; None: it is pickled otherwise."""
    import torch
    from torch._tensor import _rebuild_from_type_v2
    from torch._utils import _rebuild_tensor_v2

    if tensor.layout is not torch.strided or tensor.is_quantized:
        return None
    reduced = tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    if not isinstance(reduced, tuple):
        return None
    rebuild, args, *rest = reduced
    if rest:
        return None
    if rebuild is _rebuild_tensor_v2:
        return rebuild, args, lambda storage, offset: (rebuild, (storage, offset, *args[2:]))
    if rebuild is _rebuild_from_type_v2 and args[0] is _rebuild_tensor_v2:
        function, kind, inner, state = args
        return rebuild, inner, lambda storage, offset: (
            rebuild, (function, kind, (storage, offset, *inner[2:]), state)
        )  # fmt: skip
    return None


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The bytes of its storage from a tensor's first element to behind its last."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    size, start = tensor.dtype.itemsize, int(tensor.storage_offset())
    return start * size, (start + int(last) + 1) * size


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans that cover the ranges: one for those that overlap. They begin aligned."""
    spans: list[list[int]] = []
    for start, stop in sorted(ranges):
        if spans and start < spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], stop)
        else:
            spans.append([start, stop])
    return [(start - start % ALIGN, stop) for start, stop in spans]
