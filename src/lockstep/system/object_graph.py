"""Object graph: what can be reached from the user's objects, each with the path to it.

The walk looks into attributes, containers, closures, bound methods and partial functions, and from
the code of the user's own modules into the globals that it names. It is breadth first and bounded:
a data set may be a list of a million samples.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

MOST_OBJECTS, MOST_ITEMS = 50_000, 1_000
"""How many objects are looked at, and how many items of a container."""
ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, np.ndarray, np.generic)
"""What leads nowhere."""
_REGISTERED = ("_modules", "_parameters", "_buffers")
"""Where a module keeps what is assigned to it."""
_LIBRARIES = tuple(
    os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib", "purelib")
)

Found = tuple[str, object]
"""A path, such as `task.transform.rng`, and what is there."""


def walk(roots: Mapping[str, object]) -> Iterator[Found]:
    """Everything that can be reached from the roots, each object once, the nearest first."""
    queue: deque[Found] = deque(roots.items())
    seen: dict[int, object] = {}  # kept, so that no id is given to another object
    for _ in range(MOST_OBJECTS):
        if not queue:
            return
        path, value = queue.popleft()
        if isinstance(value, ATOMS):
            yield path, value
        elif id(value) not in seen:
            seen[id(value)] = value
            yield path, value
            queue.extend(_leading_from(path, value))


def _leading_from(path: str, value: object) -> Iterator[Found]:
    """What a value leads to directly."""
    if isinstance(value, ATOMS):
        return
    if isinstance(value, dict):
        for key, item in itertools.islice(list(value.items()), MOST_ITEMS):
            yield f"{path}[{key!r:.40}]", item
    elif isinstance(value, list | tuple | deque):
        for number, item in enumerate(itertools.islice(value, MOST_ITEMS)):
            yield f"{path}[{number}]", item
    elif isinstance(value, types.FunctionType):
        yield from _of_function(path, value)
    elif isinstance(value, types.MethodType):
        yield path, value.__self__
        yield path, value.__func__
        return
    elif isinstance(value, types.BuiltinMethodType):
        if not isinstance(value.__self__, types.ModuleType | type):
            yield f"{path}.__self__", value.__self__
        return
    elif isinstance(value, functools.partial):
        yield f"{path}.func", value.func
        yield f"{path}.args", value.args
        yield f"{path}.keywords", value.keywords
    elif isinstance(value, type):
        if _is_users(value.__module__):
            yield from _of_class(path, value)
        return
    elif isinstance(value, types.ModuleType):
        return
    yield from _of_instance(path, value)


def _of_instance(path: str, value: object) -> Iterator[Found]:
    own = _attributes(value)
    for name, item in own.items():
        if isinstance(value, nn.Module) and name in _REGISTERED:
            yield from ((f"{path}.{child}", each) for child, each in item.items())
        else:
            yield f"{path}.{name}", item
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                try:
                    yield f"{path}.{name}", object.__getattribute__(value, name)
                except AttributeError:  # it has no value, or a name of its own
                    continue
        if _is_users(kind.__module__):
            yield kind.__qualname__, kind


def _attributes(value: object) -> dict[str, Any]:
    try:
        own = object.__getattribute__(value, "__dict__")
    except (AttributeError, TypeError):
        return {}
    return dict(own) if isinstance(own, dict) else {}


def _of_class(path: str, kind: type) -> Iterator[Found]:
    for name, item in list(vars(kind).items()):
        if isinstance(item, staticmethod | classmethod):
            item = item.__func__
        elif isinstance(item, property):
            item = item.fget
        if not name.startswith("__") or isinstance(item, types.FunctionType):
            yield f"{path}.{name}", item


def _of_function(path: str, function: types.FunctionType) -> Iterator[Found]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f"{name} in {path}", cell.cell_contents
        except ValueError:  # it is empty
            continue
    yield f"{path}.__defaults__", function.__defaults__
    yield f"{path}.__kwdefaults__", function.__kwdefaults__
    module = function.__module__ or ""
    if not _is_users(module):
        return
    names = _names_in(function.__code__)
    for name in names:
        if name not in function.__globals__:
            continue
        value = function.__globals__[name]
        if not isinstance(value, types.ModuleType):
            yield f"{module}.{name}", value
        elif _is_users(value.__name__):
            for inner in names:
                if inner in vars(value):
                    yield f"{value.__name__}.{inner}", vars(value)[inner]


def _names_in(code: types.CodeType) -> list[str]:
    """The global names and attributes that code names, with that of functions inside it."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names_in(constant)
    return list(dict.fromkeys(names))


@functools.cache
def _is_users(module: str) -> bool:
    """Whether a module is the user's own, and no library."""
    top = module.partition(".")[0]
    if top in ("lockstep", "builtins") or top in sys.stdlib_module_names - {"__main__"}:
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return not file.startswith(_LIBRARIES) and f"{os.sep}site-packages{os.sep}" not in file
