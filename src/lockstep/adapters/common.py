"""Common parts of the adapters: optional packages, and arguments that may be functions."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lockstep.errors import JobError

if TYPE_CHECKING:
    from torch import nn

    from lockstep.job.task import Task


def need(package: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        JobError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise  # the package is installed, and lacks a package of its own
        raise JobError(
            f"this needs the package {package}",
            expected=f"{package}, from the extra {extra}",
            found="no such package",
            fix=f"pip install 'lockstep-dlp[{extra}]'",
        ) from None


def build_model(model: Any) -> nn.Module:
    """The module, or the one that the function builds. Called in the forkserver, seeded."""
    from torch import nn

    built: nn.Module = model if isinstance(model, nn.Module) else model()
    return built


def base_of(model: Any) -> Any:
    """A transformers model without the module that PEFT wraps around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def build_data(data: Any) -> Any:
    """The data set, or the one that the function builds."""
    return data() if callable(data) and not hasattr(data, "__getitem__") else data


def check_callable(name: str, value: object, form: str, *, optional: bool = False) -> None:
    """Check that an argument can be called.

    Raises:
        JobError: it cannot be called.
    """
    if callable(value) or (optional and value is None):
        return
    raise JobError(
        f"{name} cannot be called",
        expected=form,
        found=repr(value)[:200],
        fix=f"give a function, for instance by functools.partial: {name}={form}",
    )


def answer_by(
    task: Task, from_record: Callable[..., Any] | None, predict: Callable[..., Any] | None
) -> None:
    """Give a task the user's functions for predictions, where there are any.

    Raises:
        JobError: one of them cannot be called.
    """
    check_callable("from_record", from_record, "a function of a record", optional=True)
    check_callable("predict", predict, "a function of (model, batch)", optional=True)
    for name, function in (("from_record", from_record), ("predict", predict)):
        if function is not None:
            setattr(task, name, function)
            task.made_from = (*task.made_from, function)  # type: ignore[attr-defined]


class GivenWeights:
    """Weights that a caller has given, as `Task.sample_weights` returns them."""

    def __init__(self, weights: Any) -> None:
        self.weights = weights

    def __call__(self, data: Any) -> Any:
        return self.weights


def draw_by(task: Task, weights: Any) -> None:
    """Have a task's samples drawn by these weights, or by what a function makes of its data set."""
    if weights is None:
        return
    task.sample_weights = weights if callable(weights) else GivenWeights(weights)  # type: ignore[method-assign]
    if callable(weights):
        task.made_from = (*task.made_from, weights)  # type: ignore[attr-defined]
