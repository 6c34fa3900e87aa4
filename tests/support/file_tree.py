"""File tree: the packages and files of lockstep, as their docstrings describe them.

A package's docstring lists its files, one a line: the name, two spaces or more, a clause.
`python -m tests.support.file_tree` (or `make docs-tree`) writes the tree into
docs/architecture.md; tests/test_architecture.py checks that it is current.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "lockstep"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- file tree: made by `make docs-tree` -->", "<!-- end of the file tree -->"
ORDER = (
    "api", "cli", "dashboard", "cluster", "adapters", "recipes", "job", "planning", "slices",
    "data", "state", "device", "worker", "native", "collectives", "optim", "agent",
    "coordinator", "results", "net", "system",
)  # fmt: skip
"""The front, then the engine in the order in which a job passes through it, then what all use."""
ENTRY = re.compile(r"^(\w+)/?  +(\S.*)$", re.MULTILINE)


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text())) or ""


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0].replace("\n", " ")


def packages(folder: Path = SOURCE) -> Iterator[Path]:
    """The packages below a folder, at any depth."""
    for init in sorted(folder.glob("*/__init__.py")):
        yield init.parent
        yield from packages(init.parent)


def contents(package: Path) -> tuple[set[str], set[str]]:
    """The names of a package's files, and of the packages in it."""
    files = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    return files, {init.parent.name for init in package.glob("*/__init__.py")}


def listed(package: Path) -> dict[str, str]:
    """What a package's docstring lists, in its order: names and clauses."""
    return dict(ENTRY.findall(docstring(package / "__init__.py")))


def describe(package: Path, indent: str = "") -> Iterator[str]:
    """The lines of a package in the tree."""
    yield f"{indent}{package.name}/  {first_sentence(docstring(package / '__init__.py'))}"
    files, inner = contents(package)
    entries = {name: clause for name, clause in listed(package).items() if name in files}
    width = max(map(len, entries), default=0) + 2
    yield from (f"{indent}  {name:{width}}{clause}" for name, clause in entries.items())
    for name in sorted(inner):
        yield from describe(package / name, indent + "  ")


def tree() -> str:
    """The tree, as the page has it between its marks."""
    blocks = ["\n".join(describe(SOURCE / name)) for name in ORDER]
    errors = f"errors.py  {first_sentence(docstring(SOURCE / 'errors.py'))}"
    return "\n".join([BEGIN, "```text", "\n\n".join([*blocks, errors]), "```", END])


def replaced(page: str) -> str:
    """The page with the tree as it should be."""
    before, _, rest = page.partition(BEGIN)
    return before + tree() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text()))
