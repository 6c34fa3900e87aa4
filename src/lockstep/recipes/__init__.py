"""Ready-made jobs: `lockstep run NAME`. Each module here holds a function of its own name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from lockstep.errors import JobError
from lockstep.job.job import Job


def names() -> list[str]:
    """The recipes there are: the modules of this package, without what they share."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def at_least(least: int, **given: object) -> None:
    """Check whole numbers that a recipe was given.

    Raises:
        JobError: one is none, or is less than `least`.
    """
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise JobError(
                f"{name} is out of range",
                expected=f"a whole number, at least {least}",
                found=repr(value),
            )


def texts(**given: object) -> None:
    """Check texts that a recipe was given, or None.

    Raises:
        JobError: one is another thing, which the command line may have made of it.
    """
    for name, value in given.items():
        if value is not None and not isinstance(value, str):
            raise JobError(
                f"{name} is not a text",
                expected="a path or a name",
                found=f"{value!r}, a {type(value).__name__}",
                fix=f"quote it twice, as --{name} '\"5\"'",
            )


def find(name: str) -> Callable[..., Job]:
    """The recipe `name`: a function that returns a job.

    Raises:
        JobError: there is no such recipe.
    """
    if name not in names():
        raise JobError(
            "there is no such recipe",
            expected=" or ".join(names()),
            found=repr(name),
            fix=f"name the task in the file too: {name}:Task"
            if name.endswith(".py")
            else "name a task of your own as module:Task or file.py:Task",
        )
    recipe: Callable[..., Job] = getattr(importlib.import_module(f"{__name__}.{name}"), name)
    return recipe
