"""API reference: docs/reference.md, made of the docstrings of the public names.

`python -m tests.support.api_reference` (or `make docs-reference`) writes it;
tests/test_architecture.py checks that it is current.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

import lockstep
from lockstep.job.position import Position
from tests.support.file_tree import ROOT

PAGE = ROOT / "docs" / "reference.md"
HEAD = """# Reference

Every name of `import lockstep`, from its docstring (`make docs-reference` writes this page). The
settings of a job, which `run`, `start` and `plan` take by name: [job-files.md](job-files.md).
"""
PARTS = {
    "What you write": ["Task", "Position", "Parameters", "Together"],
    "From what you have": ["from_module", "from_transformers", "from_lightning"],
    "Running it": ["run", "start", "Run", "plan", "resume", "preloaded", "Job", "Callback"],
    "What comes of it": ["Result", "evaluate", "predict", "verify", "LockstepError"],
}
SECTION = re.compile(r"^(Args|Raises|Returns|Yields):$")
ITEM = re.compile(r"^(\w[\w, ]*): (.*)$")


def write() -> str:
    """The page."""
    parts = [HEAD]
    for title, names in PARTS.items():
        parts.append(f"## {title}\n")
        for name in names:
            parts += list(_entry(name, _object(name)))
    return "\n".join(parts).rstrip() + "\n"


def _object(name: str) -> Any:
    return Position if name == "Position" else getattr(lockstep, name)


def _entry(name: str, value: Any) -> Iterator[str]:
    yield f"### `{name}`\n"
    if inspect.isclass(value):
        yield _text(value)
        yield from _members(value)
    else:
        yield f"<!-- not run: a signature -->\n```python\nlockstep.{name}{_signature(value)}\n```\n"
        yield _text(value)


def _members(kind: type) -> Iterator[str]:
    """The fields, with the texts below them, and the methods of a class, in its order."""
    if kind.__name__ == "Job":
        return  # its fields are the settings
    tree = ast.parse(inspect.getsource(importlib.import_module(kind.__module__)))
    (body,) = [
        each.body
        for each in ast.walk(tree)
        if isinstance(each, ast.ClassDef) and each.name == kind.__name__
    ]
    for node, after in zip(body, [*body[1:], None], strict=True):
        match node:
            case ast.AnnAssign(target=ast.Name(id=name)) if not name.startswith("_"):
                text = _literal(after)
                yield f"- **`{ast.unparse(node)}`**{f'  {text}' if text else ''}\n"
            case ast.FunctionDef(name=name) if not name.startswith("_"):
                value = inspect.getattr_static(kind, name)
                if isinstance(value, property):
                    yield f"- **`{name}`**  {' '.join(_text(value.fget).split())}\n"
                else:
                    function = getattr(value, "__func__", value)
                    yield f"#### `{name}{_signature(function, 1000)}`\n"
                    yield _text(function)


def _literal(node: ast.stmt | None) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""


def _signature(function: Any, width: int = 100) -> str:
    """The parameters and the result, one a line where they are too many for one."""
    signature = inspect.signature(function)
    parts: list[str] = []
    for name, each in signature.parameters.items():
        if name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        star = "**" if each.kind is each.VAR_KEYWORD else ""
        default = "" if each.default is each.empty else f" = {each.default!r}"
        parts.append(f"{star}{name}: {_type(each.annotation)}{default}")
    result = f" -> {_type(signature.return_annotation)}"
    line = f"({', '.join(parts)}){result}"
    if len(line) <= width:
        return line
    return "(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def _type(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "Any")


def _text(value: Any) -> str:
    """A docstring as Markdown: its sections become lists."""
    lines, inside = [], False
    for line in (inspect.getdoc(value) or "").splitlines():
        if section := SECTION.match(line):
            lines += [f"**{section[1]}**", ""]
            inside = True
        elif inside and (item := ITEM.match(line.removeprefix("    "))):
            lines.append(f"- `{item[1]}`: {item[2]}")
        else:
            lines.append(line.removeprefix("    ") if inside else line)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(write())
