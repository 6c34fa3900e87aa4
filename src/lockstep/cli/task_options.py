"""Task options: the command line's options for the arguments of a recipe or task.

Which ones there are is read from the source of the recipe or of the task's class, without importing
it: importing it would import torch, and a spelling error is to be found before that.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from lockstep import recipes
from lockstep.errors import JobError
from lockstep.job.job import SETTINGS
from lockstep.system.folders import working_folder
from lockstep.system.spelling import meant

EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false"}
TRUTH = {"true": True, "yes": True, "on": True, "1": True,
         "false": False, "no": False, "off": False, "0": False}  # fmt: skip
NO_VALUES = ("none", "null")


def _number(text: str) -> int | float:
    """A whole number stays one: the manifest tells 1 from 1.0."""
    try:
        return int(text)
    except ValueError:
        return float(text)


READ: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": _number,
    "bool": lambda text: TRUTH[text.lower()],
}


@dataclass(frozen=True, kw_only=True)
class TaskOption:
    """Task option: one argument of a recipe or task."""

    name: str
    annotation: str = ""
    """Its source text; "": there is none."""
    default: str | None = None
    """Its source text; None: there is none."""
    help: str = ""

    def read(self, text: str | None) -> Any:
        """The value of an option's text; of an option without a text, True.

        Text stays as it is, unless the annotation says that it is a number, or true or false.
        Without an annotation, what is written like a number, a truth value or a list is one.

        Raises:
            JobError: it is not what the annotation says.
        """
        choices = _choices(self.annotation)
        if choices is not None:
            return self._chosen(choices, text)
        kinds = {kind.strip() for kind in self.annotation.split("|")}
        if text is None:
            if kinds <= {"int", "float", "str", "None"}:
                raise self._wrong("a value", "none")
            return True
        if "str" in kinds or "Path" in kinds:
            return text
        (kind, *others) = kinds - {"None"} or {""}
        if others or kind not in EXPECTED:
            return plain_value(text)
        if "None" in kinds and text.lower() in NO_VALUES:
            return None
        try:
            return READ[kind](text)
        except (KeyError, ValueError):
            raise self._wrong(EXPECTED[kind], repr(text)) from None

    def _chosen(self, choices: Sequence[Any], text: str | None) -> Any:
        for choice in choices:
            if text is not None and str(choice).lower() == text.lower():
                return choice
        raise self._wrong(" or ".join(map(str, choices)), "none" if text is None else repr(text))

    def _wrong(self, expected: str, found: str) -> JobError:
        return JobError(
            f"--{_dashed(self.name)} has the wrong value", expected=expected, found=found
        )


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Task options: all arguments of a recipe or task; None: its source does not say."""

    task: str
    options: Mapping[str, TaskOption] | None

    def read(self, extra: Sequence[str]) -> dict[str, Any]:
        """The arguments that the command line gives: `--model cnn` as `{"model": "cnn"}`.

        Raises:
            JobError: there is no such argument, or it cannot have such a value.
        """
        given = option_texts(extra)
        self.check(given)
        known = self.options or {}
        return {
            name: known.get(name, TaskOption(name=name)).read(text) for name, text in given.items()
        }

    def check(self, names: Mapping[str, Any]) -> None:
        """Check that there are arguments of these names.

        Raises:
            JobError: there is none of one of these names.
        """
        if self.options is None:
            return
        for name in names:
            if name not in self.options:
                guess = meant(name, [*self.options, *SETTINGS])
                raise JobError(
                    f"{self.task} does not take these arguments: "
                    f"got an unexpected keyword argument {name!r}",
                    expected=" or ".join(f"--{_dashed(each)}" for each in self.options)
                    or "no arguments, but settings of the run",
                    found=f"--{_dashed(name)}",
                    fix=f"did you mean --{_dashed(guess)}?"
                    if guess
                    else "settings of the run are listed by: lockstep run --help",
                )


def options_of(task: str) -> TaskOptions:
    """The options of a recipe, `module:Task` or `file.py:Task`."""
    label = task.rpartition(":")[2] or task
    return TaskOptions(task=label, options=_options(task))


def option_texts(extra: Sequence[str]) -> dict[str, str | None]:
    """`--model cnn --wide` as `{"model": "cnn", "wide": None}`.

    Raises:
        JobError: a word belongs to no option.
    """
    found: dict[str, str | None] = {}
    pending: str | None = None
    for item in extra:
        if item.startswith("--"):
            name, equals, value = item[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else None
            pending = None if equals else name
        elif pending is not None:
            found[pending] = item
            pending = None
        else:
            raise JobError(f"unexpected argument {item!r}", expected="--name value")
    return found


def plain_value(text: str) -> Any:
    """What is written like a number, a truth value, a list or a mapping; else the text itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.startswith(("[", "{")):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            return text
    return text


def _choices(annotation: str) -> list[Any] | None:
    """What `Literal["a", "b"]`, perhaps with `| None`, allows; None: it is something else."""
    found = re.fullmatch(r"(?:typing\.)?Literal\[(.+)\](\s*\|\s*None)?", annotation)
    if found is None:
        return None
    try:
        choices = list(ast.literal_eval(f"({found[1]},)"))
    except (SyntaxError, ValueError):
        return None
    return [*choices, None] if found[2] else choices


def _dashed(name: str) -> str:
    return name.replace("_", "-")


# Reading the source.


def _options(task: str) -> dict[str, TaskOption] | None:
    where, colon, attribute = task.rpartition(":")
    path = _source_path(where) if colon else Path(*recipes.__path__, f"{task}.py")
    if path is None:
        return None
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None  # said when it is imported
    found = _definition(tree, attribute)
    return None if found is None else _arguments(found)


def _source_path(module: str) -> Path | None:
    """The file of a module, found without importing anything."""
    here = working_folder()
    if module.endswith(".py"):
        return Path(here, module)
    search, origin = [here, *sys.path], None
    for part in module.split("."):  # by itself: a dotted name would need its parents imported
        spec = PathFinder.find_spec(part, search)
        if spec is None:
            return None
        search, origin = list(spec.submodule_search_locations or ()), spec.origin
    return Path(origin) if origin and origin.endswith(".py") else None


def _definition(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """The function of this name, or the constructor of the class; None: it cannot be told."""
    found = [each for each in tree.body if getattr(each, "name", None) == name]
    if len(found) != 1 or _assigns(tree, name):
        return None
    (made,) = found
    if isinstance(made, ast.ClassDef) and not made.decorator_list and not made.keywords:
        inner = [each for each in made.body if getattr(each, "name", None) == "__init__"]
        if len(inner) != 1:
            return None
        (made,) = inner
    if not isinstance(made, ast.FunctionDef) or made.decorator_list:
        return None
    return made


def _assigns(tree: ast.Module, name: str) -> bool:
    """Whether the module gives the name another meaning somewhere."""
    return any(
        isinstance(each, ast.Name) and each.id == name and not isinstance(each.ctx, ast.Load)
        for each in ast.walk(tree)
    )


def _arguments(function: ast.FunctionDef) -> dict[str, TaskOption] | None:
    given = function.args
    if given.kwarg is not None:
        return None
    places = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [
        *[None] * (len(places) - len(given.defaults)), *given.defaults, *given.kw_defaults,
    ]  # fmt: skip
    helps = _helps(ast.get_docstring(function) or "")
    options = {
        each.arg: TaskOption(
            name=each.arg,
            annotation=ast.unparse(each.annotation).strip("'\"") if each.annotation else "",
            default=None if default is None else ast.unparse(default),
            help=helps.get(each.arg, ""),
        )
        for each, default in zip([*places, *given.kwonlyargs], defaults, strict=True)
    }
    if function.name == "__init__":
        options.pop(places[0].arg)
    return options


def _helps(docstring: str) -> dict[str, str]:
    """What the section "Args:" of a docstring says of each argument."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    found = re.findall(
        r"^ {4}(\w+): ((?:.*\n?)(?: {8}.*\n?)*)", section[1] if section else "", re.M
    )
    return {name: " ".join(text.replace("`", "").split()) for name, text in found}
