"""Task resolution: from a task source to the task, in the process that runs the user's code."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from lockstep.errors import JobError
from lockstep.job.code_digest import parts_made_from
from lockstep.job.job import Job
from lockstep.job.offered_names import check_defined, check_loaded, check_shipped
from lockstep.job.script_state import apply_switches, apply_values
from lockstep.job.task import Task
from lockstep.job.task_checks import check_complete
from lockstep.job.task_source import TaskSource
from lockstep.system.folders import working_folder

RECIPES = "lockstep.recipes"


def resolve(source: TaskSource) -> tuple[Task, Job | None]:
    """The task of a source, and the job that came with it if the name leads to a recipe.

    Raises:
        JobError: there is no such name, or it does not lead to a task.
        TaskError: the task lacks a method that every task needs.
    """
    with _resolving():
        return _resolved(source)


_under_way = False


@contextlib.contextmanager
def _resolving() -> Iterator[None]:
    """Know, while it lasts, that code that is imported is looked through for a task."""
    global _under_way
    _under_way = True
    try:
        yield
    finally:
        _under_way = False


def check_not_resolving() -> None:
    """Refuse to start a run from code that another run imports.

    Raises:
        JobError: a task is being looked for.
    """
    if _under_way:
        raise JobError(
            "a run is started by code that is imported in order to find a task in it",
            expected="a module or file that defines the task, and starts nothing when imported",
            found="a call that starts a run, or that makes use of one",
            fix='put it under: if __name__ == "__main__":',
        )


def _resolved(source: TaskSource) -> tuple[Task, Job | None]:
    found: Any
    if source.payload is not None:
        found = _unpickled(source.payload)
    else:
        maker = _named(source)
        found = _call(maker, source)
        made = found.task if isinstance(found, Job) else found
        if isinstance(made, Task) and inspect.isroutine(maker):
            made.made_from = (*parts_made_from(made), maker)  # type: ignore[attr-defined]
    if isinstance(found, Job):
        if isinstance(found.task, str):
            raise JobError(
                f"{source.name} returned a job whose task is a name", fix="return a Task"
            )
        return check_complete(found.task), found
    if isinstance(found, Task):
        return check_complete(found), None
    raise JobError(
        f"{source.name} does not lead to a task",
        expected="a Task class or instance, or a function that returns a Job",
        found=repr(type(found)),
    )


def _unpickled(payload: bytes) -> Any:
    """The task that a script has handed over, with what the script has set in modules."""
    with io.BytesIO(payload) as file:
        state = pickle.load(file)
        apply_switches(state)
        found = pickle.load(file)
    apply_values(state)
    return found


def _call(found: Any, source: TaskSource) -> Any:
    """What a class or function returns for the source's arguments; other objects as they are."""
    if isinstance(found, Task) or not callable(found):
        return found
    try:
        inspect.signature(found).bind(**source.args)
    except TypeError as error:
        raise JobError(
            f"{source.name} does not take these arguments: {error}",
            expected=str(inspect.signature(found)),
            found=", ".join(f"{k}={v!r}" for k, v in source.args.items()) or "none",
            fix="settings of the run are listed by: lockstep run --help",
        ) from None
    return found(**source.args)


def _named(source: TaskSource) -> Any:
    """The object that a name leads to: a recipe, or an attribute of a module or a file."""
    if ":" in source.name:
        return _find(source)
    # Imported by name, as the user's modules are: recipes are in a higher layer than this package.
    return importlib.import_module(RECIPES).find(source.name)


def _find(source: TaskSource) -> Any:
    """The attribute that `module:Task` or `file.py:Task` names."""
    where, _, attribute = source.name.rpartition(":")
    if source.folder:
        check_shipped(where, source.folder)
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    if source.folder:
        check_loaded(module, source.folder)
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        tasks = [
            key for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Task) and value is not Task
        ]  # fmt: skip
        raise JobError(
            f"there is no {attribute} in {where}",
            expected=f"one of: {', '.join(tasks)}" if tasks else "a subclass of lockstep.Task",
            fix=f"name a task of {where}",
        )
    if source.offered:
        check_defined(found, module, functions=source.functions)
    return found


def check_file(path: Path) -> None:
    """Check that a task's file is there: early, before torch is loaded.

    Raises:
        JobError: it is not.
    """
    if not path.is_file():
        raise JobError(f"there is no file {path}", fix="give the path of a Python file, then :Task")


def _import_file(path: Path) -> ModuleType:
    check_file(path)
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    here = working_folder()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise JobError(
                f"there is no module {error.name}",
                found=f"looked in {here} and the Python path",
                fix="run from the folder that holds it, or give file.py:Task",
            ) from None
        raise
