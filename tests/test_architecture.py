"""Architecture: the rules of docs/architecture.md that a machine can check.

That a run leaves torch out of the coordinator's process is checked by
tests/job/test_task_source.py::test_a_master_does_not_import_torch.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lockstep
from tests.support import api_reference, command, file_tree
from tests.support.file_tree import ROOT, SOURCE

MAX_LINES = 450
PUBLIC = [
    "Callback", "Job", "LockstepError", "Parameters", "Result", "Run", "Task", "Together",
    "evaluate", "from_lightning", "from_module", "from_transformers",
    "plan", "predict", "preloaded", "resume", "run", "start", "verify",
]  # fmt: skip
WITHOUT_TORCH = ("agent", "coordinator", "api", "planning")
FILES = sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def test_import_contracts() -> None:
    """The layers and the forbidden imports of pyproject.toml."""
    code = "from importlinter.cli import lint_imports_command as main; main()"
    ended = command.python("-c", code, "--no-logo", "--no-cache", cwd=ROOT)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_exported_names() -> None:
    assert lockstep.__all__ == PUBLIC
    for name in PUBLIC:
        assert getattr(lockstep, name).__name__ == name


def test_no_package_is_called_like_an_exported_name() -> None:
    """Importing it would replace what `lockstep.NAME` leads to."""
    assert not {package.name for package in file_tree.packages() if package.parent == SOURCE} & {
        *PUBLIC
    }


def test_what_supervises_and_plans_does_not_import_torch(tmp_path: Path) -> None:
    """Directly or through others: it would take seconds, in every process."""
    modules = ["lockstep.api.training", "lockstep.agent.agent", "lockstep.coordinator.coordinator"]
    modules += [f"lockstep.planning.{path.stem}" for path in (SOURCE / "planning").glob("*.py")]
    code = f"import {', '.join(modules)}, sys; sys.exit('torch' in sys.modules)".replace(
        ".__init__", ""
    )
    ended = command.python("-c", code, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("package", WITHOUT_TORCH)
def test_no_import_of_torch_at_the_top_of_a_file(package: str) -> None:
    for path in sorted((SOURCE / package).rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            found = [name for name in names if name.partition(".")[0] == "torch"]
            assert not found, f"{name_of(path)}, line {node.lineno}"


@pytest.mark.parametrize("package", sorted(file_tree.packages()), ids=name_of)
def test_a_package_lists_its_files(package: Path) -> None:
    """Its docstring has a line for each file, with a clause; packages in it may have one."""
    files, inner = file_tree.contents(package)
    listed = set(file_tree.listed(package))
    missing = {
        name: file_tree.first_sentence(file_tree.docstring(package / f"{name}.py"))
        for name in sorted(files - listed)
    }
    assert not missing, f"{name_of(package)}/__init__.py does not list them"
    assert not listed - files - inner, "listed, but not there"


def test_the_reference_is_current_and_whole() -> None:
    assert api_reference.PAGE.read_text() == api_reference.write(), "run: make docs-reference"
    listed = {name for names in api_reference.PARTS.values() for name in names}
    assert listed - {"Position"} == set(lockstep.__all__)


def test_the_file_tree_in_the_documents_is_current() -> None:
    page = file_tree.PAGE.read_text()
    assert file_tree.replaced(page) == page, "run: make docs-tree"


def test_the_file_tree_has_every_package() -> None:
    assert set(file_tree.ORDER) == file_tree.contents(SOURCE)[1]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES
