"""Which jobs a host takes. Pure, but for a look at which modules there are.

An offer names a task that the host looks up by itself, and calls with arguments of the offer. Any
function of any module can be named so: a host takes recipes, and else only what it was told to.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from lockstep.errors import JobError, LockstepError
from lockstep.offer import Offer


def refusal(offer: Offer, allow: Sequence[str], name: str) -> LockstepError | None:
    """Why the host of this name does not take a job; None if it does.

    `allow` has modules whose tasks may run, each with the modules in it; or whole names of tasks.
    """
    place, colon, _ = offer.task.rpartition(":")
    if not colon:
        return None  # a recipe
    if place.endswith(".py"):
        return JobError(
            f"host {name} does not take the task {offer.task!a}",
            expected="a recipe, or module:Task of a module that every host has",
            found="the path of a file, which is on the master's host",
            fix="put the file into a package that is installed on every host",
        )
    if not any(_covers(allowed, offer.task, place) for allowed in allow):
        top = place.partition(".")[0]
        return JobError(
            f"host {name} does not take the task {offer.task!a}",
            expected=f"a recipe, or a task of: {', '.join(allow) or '(nothing is allowed)'}",
            found=f"the module {place!a}",
            fix=f"if its code may run there: lockstep join --allow {top}",
        )
    if _missing(place):
        return JobError(
            f"host {name} has no module {place!a}",
            expected="the same code on every host",
            found="none in the folder of its `lockstep join` and on its Python path",
            fix="install it there, or start `lockstep join` in the folder that holds it",
        )
    return None


def _covers(allowed: str, task: str, module: str) -> bool:
    return allowed == task or module == allowed or module.startswith(f"{allowed}.")


def _missing(module: str) -> bool:
    """Whether a module's outermost package cannot be found. Imports nothing."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is None
    except (ImportError, ValueError):
        return True
