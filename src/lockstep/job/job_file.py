"""Job file: a YAML mapping of a task and its settings, with errors that name the line.

task: mnist            # a recipe, module:Task or file.py:Task
args: {model: cnn}
data_epochs: 5
workers: 2
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from lockstep.errors import JobError
from lockstep.job.job import SETTINGS, Job

SUFFIXES = (".yaml", ".yml")


def read_job_file(path: Path) -> Job:
    """The job that a file describes. A task's file is relative to the folder of the job file.

    Raises:
        JobError: the file is missing, is not YAML, or has an unknown key or a wrong value.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"the job file {path} cannot be read: {error}") from None
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise JobError(f"the job file {path} is not YAML: {error}") from None
    if not isinstance(root, yaml.MappingNode) or not isinstance(content, dict):
        raise JobError(
            f"the job file {path} is not a mapping",
            expected="`task: ...` and settings",
            found=type(content).__name__,
        )
    lines = _lines(path, root)
    for key, value in content.items():
        _check(path, lines.get(str(key), 1), key, value)
    if "task" not in content:
        raise JobError(f"the job file {path} names no task", fix="add a line such as `task: mnist`")
    content["task"] = _beside(path, content["task"])
    return Job(**{str(key): value for key, value in content.items()})


def _lines(path: Path, root: yaml.MappingNode) -> dict[str, int]:
    """The line of each key.

    Raises:
        JobError: a key is given twice, of which YAML would silently take the last.
    """
    lines: dict[str, int] = {}
    for key, _ in root.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise JobError(
                f"{path}, line {line}: {key.value} is given twice",
                expected="each setting once",
                found=f"it is in line {lines[key.value]} too",
                fix="remove one of them",
            )
        lines[key.value] = line
        if key.tag.endswith((":bool", ":int", ":float", ":null")):  # `on` is read as True
            lines[str(yaml.safe_load(key.value))] = line
    return lines


def _check(path: Path, line: int, key: Any, value: Any) -> None:
    """Check one key by itself, so that an error can name its line."""
    where = f"{path}, line {line}"
    if key == "task":
        if not isinstance(value, str):
            raise JobError(f"{where}: task is not a name", expected="text", found=repr(value))
    elif key == "args":
        if not isinstance(value, dict):
            raise JobError(f"{where}: args is not a mapping", found=repr(value))
    elif key not in SETTINGS:
        raise JobError(
            f"{where}: unknown key {key!r}",
            expected=f"task, args, {', '.join(SETTINGS)}",
            fix="correct the key; what the task itself takes goes under args",
        )
    else:
        try:
            SETTINGS[key].checked(value)
        except JobError as error:
            raise JobError(
                f"{where}: {error.what}", expected=error.expected, found=error.found, fix=error.fix
            ) from None


def _beside(path: Path, task: str) -> str:
    """The task's name, with a relative file made absolute by the folder of the job file."""
    file, colon, attribute = task.rpartition(":")
    if colon and file.endswith(".py") and not Path(file).is_absolute():
        return f"{(path.parent / file).resolve()}:{attribute}"
    return task
