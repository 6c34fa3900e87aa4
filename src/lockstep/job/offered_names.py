"""Offered names: the checks of a task name that another host has sent.

To resolve a name is to import a module and to call what it finds there. These checks limit that to
the module that was allowed.
"""

from __future__ import annotations

import functools
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from lockstep.errors import JobError
from lockstep.job.task import Task


def is_plain(name: str) -> bool:
    """Whether a task name is that of a recipe, or `module:Task` with nothing but identifiers: it
    leads to no path."""
    return all(part.isidentifier() for part in name.replace(":", ".", 1).split("."))


def check_shipped(module: str, folder: str) -> None:
    """Check that importing a module would take it from the folder of code that was sent.

    Raises:
        JobError: it is not there, or another one of this name is in use.
    """
    if module.endswith(".py") or not all(part.isidentifier() for part in module.split(".")):
        raise JobError(
            f"the module {module!a} is not in the code that was shipped",
            expected="a name of identifiers with dots between them",
            found="a path, or something else",
            fix="name a task as `lockstep pack` prints it",
        )
    top = module.partition(".")[0]
    used = top in sys.modules
    if used or PathFinder.find_spec(top, [folder]) is None:
        raise JobError(
            f"the module {module!a} is not in the code that was shipped",
            expected="the module of the task, under a name of its own",
            found="one that Python or Lockstep itself uses" if used else "none",
            fix="name a task of the code that is shipped",
        )


def check_loaded(module: ModuleType, folder: str) -> None:
    """Check that a module was loaded from the folder of code that was sent.

    Raises:
        JobError: it comes from somewhere else.
    """
    file = getattr(module, "__file__", None) or ""
    if not Path(file).resolve().is_relative_to(Path(folder).resolve()):
        raise JobError(
            f"the module {module.__name__!a} is not in the code that was shipped",
            expected="a file of the code whose digest was allowed",
            found=file or "no file",
            fix="name a task of the code that is shipped",
        )


def check_defined(found: Any, module: ModuleType, *, functions: bool = True) -> None:
    """Check that what a name leads to is a task, or is defined in the module's package.

    An offer carries arguments too: without this, a name of something that the module has merely
    imported, such as `os.system`, would be called with them. `functions`: whether something else
    than a task may be called, since it was allowed by its full name, or as a part of the code.

    Raises:
        JobError: it is neither.
    """
    while isinstance(found, functools.partial):
        found = found.func
    if isinstance(found, Task) or (isinstance(found, type) and issubclass(found, Task)):
        return
    if not functions:
        raise JobError(
            f"an offered name of the module {module.__name__} does not lead to a Task",
            expected="a subclass of lockstep.Task, or a function that was allowed by its full name",
            found=f"a {type(found).__name__}",
            fix="lockstep join --allow MODULE:FUNCTION",
        )
    home = getattr(found, "__module__", None) or "no module"
    if home.partition(".")[0] != module.__name__.partition(".")[0]:
        raise JobError(
            f"an offered name leads out of the module {module.__name__}",
            expected="a task, or a function that is defined there",
            found=f"something of {home}",
            fix="define a function there that returns the job",
        )
