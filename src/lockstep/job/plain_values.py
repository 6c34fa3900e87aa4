"""Plain values: numbers, texts and containers of them, in a form that can be compared and sent.

A container is set in place where there is one already, since others may refer to it.
"""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import PosixPath
from types import SimpleNamespace
from typing import Any

NOT_PLAIN: Any = object()
"""What `encode` returns of anything else; also: there is no value."""
MOST, DEEPEST = 10_000, 8
"""Elements of a value, and levels of containers; a larger value is data, not a setting."""
_SCALARS = (bool, int, float, complex, str, bytes, type(None), PosixPath)
_SCALAR_NAMES, _INEXACT = {kind.__name__ for kind in _SCALARS}, ("float", "complex")
_CONTAINERS = (list, tuple, set, frozenset, dict)
_OF_TORCH = ("dtype", "device", "memory_format", "layout")


def encode(value: Any) -> Any:
    """A value as `(kind, content)`, equal for equal values of the same types."""
    left = [MOST]
    return _encode(value, DEEPEST, left)


def _encode(value: Any, depth: int, left: list[int]) -> Any:
    left[0] -= 1
    kind = type(value)
    if left[0] < 0 or (kind in _CONTAINERS and len(value) > left[0]):
        return NOT_PLAIN
    if kind in _SCALARS:
        return kind.__name__, repr(value) if kind in (float, complex) else value
    if kind.__module__ == "torch" and kind.__name__ in _OF_TORCH:
        return f"torch.{kind.__name__}", str(value)
    if depth == 0:
        return NOT_PLAIN
    if kind in (list, tuple):
        return _whole(kind.__name__, [_encode(each, depth - 1, left) for each in value])
    if kind in (set, frozenset):
        parts = [_encode(each, depth - 1, left) for each in value]
        return NOT_PLAIN if NOT_PLAIN in parts else (kind.__name__, sorted(parts, key=repr))
    if kind is dict:
        pairs = [
            part
            for item in value.items()
            for part in (_encode(each, depth - 1, left) for each in item)
        ]
        return _whole("dict", pairs)
    if _is_record(kind) and hasattr(value, "__dict__"):
        content = _encode(vars(value), depth - 1, left)
        origin = f"{kind.__module__}:{kind.__qualname__}"
        return NOT_PLAIN if content is NOT_PLAIN else (origin, content)
    return NOT_PLAIN


def _whole(kind: str, parts: list[Any]) -> Any:
    return NOT_PLAIN if any(part is NOT_PLAIN for part in parts) else (kind, parts)


def _is_record(kind: type) -> bool:
    """Whether objects of a class are names and values alone."""
    return kind in (Namespace, SimpleNamespace) or hasattr(kind, "__dataclass_fields__")


def decode(encoded: Any, current: Any = NOT_PLAIN) -> Any:
    """The value, in `current` where that is a container of its type."""
    kind, content = encoded
    if kind in _SCALAR_NAMES:
        return {"float": float, "complex": complex}[kind](content) if kind in _INEXACT else content
    if kind == "torch.device":
        return sys.modules["torch"].device(content)
    if kind.startswith("torch."):
        return getattr(sys.modules["torch"], content.removeprefix("torch."))
    if kind == "dict":
        keys, values = content[::2], content[1::2]
        made = {decode(key): decode(value) for key, value in zip(keys, values, strict=True)}
        return _refilled(current, made) if type(current) is dict else made
    if kind in ("list", "tuple", "set", "frozenset"):
        parts = [decode(part) for part in content]
        if kind == "list" and type(current) is list:
            current[:] = parts
            return current
        if kind == "set" and type(current) is set:
            current.clear()
            current.update(parts)
            return current
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](parts)
    return _record(kind, decode(content), current)


def _refilled(current: Any, made: dict[Any, Any]) -> Any:
    current.clear()
    current.update(made)
    return current


def _record(origin: str, values: dict[str, Any], current: Any) -> Any:
    """An object of a class, with these attributes."""
    module, _, name = origin.partition(":")
    if f"{type(current).__module__}:{type(current).__qualname__}" != origin:
        found: Any = sys.modules.get(module) or importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        current = found.__new__(found)
    _refilled(vars(current), values)
    return current
