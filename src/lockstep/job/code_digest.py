"""Code digest: a digest of the source files that define a task."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

from blake3 import blake3

from lockstep.job.task import Task


def code_digest(task: Task) -> str:
    """A digest of the file that defines the task, or of its methods' source; "" if unknown.

    A task of an adapter lists in `made_from` the user's objects that it was made from, and so does
    a task that a named function has returned.
    """
    parts = (type(task), *parts_made_from(task))
    found = dict.fromkeys(data for part in parts if (data := _code(part)))  # each file once
    return blake3(b"".join(found)).hexdigest()[:32] if found else ""


def parts_made_from(task: Task) -> tuple[Any, ...]:
    """The objects that a task was made from, recursively."""
    parts = getattr(task, "made_from", ())
    return tuple(
        inner for part in parts
        for inner in (part, *(parts_made_from(part) if isinstance(part, Task) else ()))
    )  # fmt: skip


def _code(part: Any) -> bytes:
    """The file that defines a class, a function, or an object's class."""
    if isinstance(part, functools.partial):
        part = part.func
    kind = part if inspect.isclass(part) or inspect.isroutine(part) else type(part)
    try:
        path = inspect.getsourcefile(kind)
        return Path(path).read_bytes() if path else inspect.getsource(kind).encode()
    except (OSError, TypeError):
        try:  # in a notebook, whose classes have no file, but whose functions have a cell
            methods = [value for value in vars(kind).values() if inspect.isfunction(value)]
            return "".join(map(inspect.getsource, methods)).encode()
        except (OSError, TypeError):
            return b""
