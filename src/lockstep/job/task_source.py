"""Where a task comes from, and how a process gets hold of it.

A task is named (a recipe, `module:Task`, `file.py:Task`) or handed over as a live object. Names are
resolved in the nursery, so the process that coordinates never imports the user's code. Objects go
to the nursery, a child of the process that made them, by cloudpickle in an anonymous file: that is
the one place where anything is unpickled, and nobody else can write to it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from lockstep.errors import JobError, TaskError
from lockstep.job.code_digest import code_digest, parts_made_from
from lockstep.job.job import Job
from lockstep.job.task import Task
from lockstep.system.folders import working_folder
from lockstep.system.json_files import plain

RECIPES = "lockstep.recipes"


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """A task's origin. `payload` is the pickled object where there is no name."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    payload: bytes | None = None
    code: str = ""
    """The digest of the code of a pickled object, made where the code is."""
    folder: str = ""
    """Where its module has to come from, if another host has sent it."""
    offered: bool = False
    """Whether another host has named it: then the name leads only to what its package defines."""

    @property
    def label(self) -> str:
        """A short name, for run folders and messages."""
        tail = self.name.rpartition(":")[2] or self.name
        return "".join(c if c.isalnum() or c in "-_" else "-" for c in tail).lower()


def source_of(job: Job) -> TaskSource:
    """The source of a job's task."""
    if isinstance(job.task, str):
        _check_args(job.args)
        return TaskSource(name=_absolute(job.task), args=dict(job.args))
    if not isinstance(job.task, Task):
        raise JobError(
            "the task is not a Task",
            expected="an instance of lockstep.Task, or a name",
            found=repr(type(job.task)),
            fix="subclass lockstep.Task and pass an instance",
        )
    kind = type(job.task)
    module = kind.__module__
    if module == "__main__":
        module = getattr(sys.modules["__main__"], "__file__", None) or "__main__"
    return TaskSource(
        name=_absolute(f"{module}:{kind.__qualname__}"),
        payload=_pickled(job.task),
        code=code_digest(job.task),
    )


def _pickled(task: Task) -> bytes:
    import cloudpickle

    try:
        pickled: bytes = cloudpickle.dumps(task)
    except Exception as error:  # whatever an object's own __reduce__ may raise
        held = ", ".join(f"self.{name}" for name in vars(task) if not _can_pickle(task, name))
        raise TaskError(
            f"the task {type(task).__name__} cannot be handed to another process: {error}",
            expected="a task that can be pickled, as its attributes and its code's globals can",
            found=held or "something that its methods or its module refer to",
            fix="open files, locks and connections in train_data() or model(), which run there",
        ) from error
    return pickled


def _can_pickle(task: Task, name: str) -> bool:
    import cloudpickle

    try:
        cloudpickle.dumps(vars(task)[name])
    except Exception:
        return False
    return True


def _check_args(args: Mapping[str, Any]) -> None:
    """The arguments of a named task go into the manifest, as JSON."""
    for name, value in args.items():
        try:
            same = json.loads(json.dumps(plain(value))) == plain(value)
        except (TypeError, ValueError):
            same = False
        if not isinstance(name, str) or not same:
            raise JobError(
                f"the argument {name!r} cannot be written to the manifest",
                expected="text, numbers, true or false, null, and lists and mappings of these",
                found=repr(value)[:200],
                fix="give what it is made from, or hand over the task as an object",
            )


def _absolute(name: str) -> str:
    """A name that means the same from another folder."""
    place, colon, attribute = name.rpartition(":")
    if colon and place.endswith(".py"):
        return f"{Path(working_folder(), place).resolve()}:{attribute}"
    return name


def resolve(source: TaskSource) -> tuple[Task, Job | None]:
    """The task, and the job that came with it if the name leads to a recipe.

    Raises:
        JobError: there is no such name, or it does not lead to a task.
        TaskError: the task lacks a method that every task needs.
    """
    found: Any
    if source.payload is not None:
        import cloudpickle

        found = cloudpickle.loads(source.payload)
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
        return _complete(found.task), found
    if isinstance(found, Task):
        return _complete(found), None
    raise JobError(
        f"{source.name} does not lead to a task",
        expected="a Task class or instance, or a function that returns a Job",
        found=repr(type(found)),
    )


_METHODS = {
    "model": "def model(self): the nn.Module to train",
    "train_data": "def train_data(self): a map-style data set",
    "loss": "def loss(self, model, batch): the mean loss over the batch",
    "optimizer": "def optimizer(self, params): a torch.optim.Optimizer over params",
}
"""What a task must define, and how."""


def _complete(task: Task) -> Task:
    """The task, if it has every method that a task needs."""
    missing = [
        name
        for name in _METHODS
        if getattr(getattr(task, name), "__func__", None) is getattr(Task, name)
    ]
    if missing:
        kind = type(task).__name__
        raise TaskError(
            f"the task {kind} has no {' and no '.join(missing)}",
            expected="; ".join(_METHODS[name] for name in missing),
            fix=f"write {'it' if len(missing) == 1 else 'them'} in class {kind}",
        )
    _check_attributes(task)
    return task


def _check_attributes(task: Task) -> None:
    """Refuse attributes that stand in the way of a method, and a misspelt interval."""
    from torch import nn

    kind = type(task).__name__
    for name, value in vars(task).items():
        if callable(getattr(Task, name, None)) and (
            isinstance(value, nn.Module) or not callable(value)
        ):
            raise TaskError(
                f"the task {kind} has an attribute {name}, which hides the method {name}()",
                expected=_METHODS.get(name, f"the method {name}() alone"),
                found=f"self.{name} is a {type(value).__name__}",
                fix="give the attribute another name",
            )
    if task.scheduler_interval not in ("step", "data_epoch"):
        raise TaskError(
            f"the scheduler_interval of {kind} is not one of its values",
            expected="step or data_epoch",
            found=repr(task.scheduler_interval),
            fix="name when the schedule is stepped",
        )


def _call(found: Any, source: TaskSource) -> Any:
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
    """What the name leads to: a recipe, or something of a module or a file."""
    if ":" in source.name:
        return _find(source)
    # By name, as a task of the user's: recipes are made of what lies above this package.
    return importlib.import_module(RECIPES).find(source.name)


def _find(source: TaskSource) -> Any:
    place, _, attribute = source.name.rpartition(":")
    if source.folder:
        check_shipped(place, source.folder)
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        tasks = [
            key for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Task) and value is not Task
        ]  # fmt: skip
        raise JobError(
            f"there is no {attribute} in {place}",
            expected=f"one of: {', '.join(tasks)}" if tasks else "a subclass of lockstep.Task",
            fix=f"name a task of {place}",
        )
    if source.offered:
        check_defined(found, module)
    return found


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise JobError(f"there is no file {path}", fix="give the path of a Python file, then :Task")
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
