"""Offered names: the checks of a task name that another host has sent.

To resolve a name is to import a module and to call what it finds there. These checks limit that to
the module that was allowed.
"""

from __future__ import annotations

import functools
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from lockstep.errors import JobError
from lockstep.job.task import Task


def check_shipped(module: str, folder: str) -> None:
    """Check that importing a module would take it from the folder of code that was sent.

    Raises:
        JobError: it is not there, or another one of this name is in use.
    """
    top = module.partition(".")[0]
    used = top in sys.modules
    if used or PathFinder.find_spec(top, [folder]) is None:
        raise JobError(
            f"the module {module!a} is not in the code that was shipped",
            expected="the module of the task, under a name of its own",
            found="one that Python or Lockstep itself uses" if used else "none",
            fix="name a task of the code that is shipped",
        )


def check_defined(found: Any, module: ModuleType) -> None:
    """Check that what a name leads to is a task, or is defined in the module's package.

    An offer carries arguments too: without this, a name of something that the module has merely
    imported, such as `os.system`, would be called with them.

    Raises:
        JobError: it is neither.
    """
    while isinstance(found, functools.partial):
        found = found.func
    if isinstance(found, Task) or (isinstance(found, type) and issubclass(found, Task)):
        return
    home = getattr(found, "__module__", None) or "no module"
    if home.partition(".")[0] != module.__name__.partition(".")[0]:
        raise JobError(
            f"an offered name leads out of the module {module.__name__}",
            expected="a task, or a function that is defined there",
            found=f"something of {home}",
            fix="define a function there that returns the job",
        )
