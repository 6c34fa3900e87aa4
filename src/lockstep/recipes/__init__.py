"""Recipes: functions that return ready-made jobs, for `lockstep run NAME`.

A recipe is a module here that holds a function of its own name. Packages hold what recipes share.

mnist         handwritten digits: softmax regression, an MLP or a CNN
vision        images, by a small residual network
recommend     the next item of a user, by self-attention
clicks        yes or no from a table, by DeepFM
translate     translation, by a transformer
summarise     summaries, by a transformer
game          Connect Four by self-play
cartpole      a pole on a cart, by PPO
connect_four  rules, search, network and opponents of the recipe `game`
text          tokens, transformer and beam search of the recipes on texts
datasets      the recipes' data sets: fetched, checked and read
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from lockstep.errors import JobError
from lockstep.job.job import Job
from lockstep.system.spelling import meant


def names() -> list[str]:
    """The names of the recipes: the modules of this package that are not packages."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)


def at_least(least: int, **given: object) -> None:
    """Check arguments of a recipe that are whole numbers.

    Raises:
        JobError: one is not a whole number, or is less than `least`.
    """
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise JobError(
                f"{name} is out of range",
                expected=f"a whole number, at least {least}",
                found=repr(value),
            )


def texts(**given: object) -> None:
    """Check arguments of a recipe that are texts or None.

    Raises:
        JobError: one is neither, such as `data: 5` in a job file.
    """
    for name, value in given.items():
        if value is not None and not isinstance(value, str):
            raise JobError(
                f"{name} is not a text",
                expected="a path or a name",
                found=f"{value!r}, a {type(value).__name__}",
                fix=f"put it in quotes, as {name}: '5'",
            )


def check_name(name: str) -> None:
    """Check that there is a recipe of this name. Imports none of them.

    Raises:
        JobError: there is none.
    """
    if name in names():
        return
    guess = meant(name, names())
    if name.endswith(".py"):
        fix = f"name the task in the file too: {name}:Task"
    elif guess:
        fix = f"did you mean {guess}?"
    else:
        fix = "name a task of your own as module:Task or file.py:Task"
    raise JobError(
        "there is no such recipe", expected=" or ".join(names()), found=repr(name), fix=fix
    )


def find(name: str) -> Callable[..., Job]:
    """The recipe `name`: a function that returns a job.

    Raises:
        JobError: there is no such recipe.
    """
    check_name(name)
    recipe: Callable[..., Job] = getattr(importlib.import_module(f"{__name__}.{name}"), name)
    return recipe
