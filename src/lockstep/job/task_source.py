"""Task source: where a task comes from, so that another process can get hold of it.

A task is named (a recipe, `module:Task`, `file.py:Task`) or handed over as a live object. Names are
resolved in the forkserver, so the coordinator's process never imports the user's code. Objects go
to the forkserver, a child of the process that made them, by cloudpickle in an anonymous file: that
is the one place where anything is unpickled, and nobody else can write to it.
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.errors import JobError, TaskError
from lockstep.job.code_digest import code_digest
from lockstep.job.job import Job
from lockstep.job.task import Task
from lockstep.system.folders import working_folder
from lockstep.system.json_files import plain


@dataclass(frozen=True, kw_only=True)
class TaskSource:
    """Task source: the task's name and arguments, or the pickled task."""

    name: str
    """The name to resolve; of a pickled task, `module:Class` for messages."""
    args: Mapping[str, Any] = field(default_factory=dict)
    payload: bytes | None = None
    """The pickled `ScriptState`, and behind it the pickled task; None: it is found by its name."""
    code: str = ""
    """The code digest of a pickled task, made in the process that has the code."""
    folder: str = ""
    """The folder that the task's module has to come from, where another host has sent the code."""
    offered: bool = False
    """Whether another host has sent the name; see `lockstep.job.offered_names`."""
    functions: bool = True
    """Whether that name may lead to a function, and not to a Task alone."""

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
    from lockstep.job.script_state import collect
    from lockstep.job.tensor_pickling import dumps

    state = pickle.dumps(collect())
    try:
        return dumps(task, state)
    except Exception as error:  # whatever an object's own __reduce__ may raise
        held = ", ".join(f"self.{name}" for name in vars(task) if not _can_pickle(task, name))
        raise TaskError(
            f"the task {type(task).__name__} cannot be handed to another process: {error}",
            expected="a task that can be pickled, as its attributes and its code's globals can",
            found=held or "something that its methods or its module refer to",
            fix="open files, locks and connections in train_data() or model(), which run there",
        ) from error


def _can_pickle(task: Task, name: str) -> bool:
    import cloudpickle

    try:
        cloudpickle.dumps(vars(task)[name])
    except Exception:
        return False
    return True


def _check_args(args: Mapping[str, Any]) -> None:
    """Check that the arguments of a named task can be written to the manifest, as JSON."""
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
    """The name, with the path of its file made absolute."""
    file, colon, attribute = name.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{Path(working_folder(), file).resolve()}:{attribute}"
    return name
