"""What a name may lead to that another host has offered: nothing but its own package's code."""

from __future__ import annotations

import functools
import sys
from importlib.machinery import PathFinder
from types import ModuleType
from typing import Any

from lockstep.errors import JobError
from lockstep.job.job import Task


def check_shipped(module: str, folder: str) -> None:
    """Check that importing a module takes it from the folder of code that was sent.

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
    """Check that a name of a module is not that of something it has merely imported.

    `os.system` can be called with arguments of the offer as well as any function that makes a job.

    Raises:
        JobError: it is neither a task nor defined in the module's package.
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
