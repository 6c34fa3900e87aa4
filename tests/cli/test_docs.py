"""What the documents say: their example runs, and the tests, files and settings they name exist."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.cli.main import app
from lockstep.job import settings_table
from lockstep.job.job import SETTINGS
from lockstep.recipes.datasets import fetch
from tests.support import command

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def functions(path: Path) -> Iterator[str]:
    """The names of a file's functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node.name


def test_the_readme_example(tmp_path: Path) -> None:
    fetch("mnist")
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    ended = command.python("example.py", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split(" workers: ") for line in ended.stdout.splitlines()]
    assert [workers for workers, _ in lines] == ["1", "2", "3"]
    assert len({fingerprint for _, fingerprint in lines}) == 1


def test_the_example_files(tmp_path: Path) -> None:
    """The job file, and with it the task of digits.py."""
    fetch("mnist")
    job = str(ROOT / "examples" / "job.yaml")
    ended = command.lockstep("run", job, "--steps=10", "--quiet", "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["metrics"]["accuracy"] > 0.3


def test_the_site(tmp_path: Path) -> None:
    """It is built without a warning, from every page that there is."""
    pytest.importorskip("zensical", reason="needs the extra docs")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--config-file", "mkdocs.yml", "--strict"],
        cwd=tmp_path, capture_output=True, text=True, timeout=command.LIMIT_SECONDS,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    built = {
        str(path.relative_to(tmp_path / "build" / "docs").with_suffix(".md"))
        for path in (tmp_path / "build" / "docs").rglob("*.html")
    }
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= built
    listed = (ROOT / "mkdocs.yml").read_text()
    assert not [page for page in pages if page not in listed]


@pytest.mark.parametrize("name", NAMES)
def test_named_tests_exist(name: str) -> None:
    for file, function in re.findall(
        r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / name).read_text()
    ):
        assert (ROOT / file).is_file(), file
        assert not function or function in functions(ROOT / file), f"{file}::{function}"


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (ROOT / name).parent.joinpath(target).exists(), (
            target
        )


def test_commands_exist() -> None:
    known = {
        item.name or getattr(item.callback, "__name__", "") for item in app.registered_commands
    }
    known |= {group.name or "" for group in app.registered_groups}
    used = re.findall(
        r"^lockstep ([\w-]+)|`lockstep ([\w-]+)", (ROOT / "README.md").read_text(), re.M
    )
    assert {first or second for first, second in used} <= known


def test_every_setting_is_documented() -> None:
    documented = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "job-files.md").read_text(), re.M)
    assert sorted(documented) == sorted(SETTINGS)


def test_the_tables_of_settings_are_current() -> None:
    page = (ROOT / "docs" / "job-files.md").read_text()
    how = "python -m lockstep.job.settings_table docs/job-files.md"
    assert settings_table.fill_in(page) == page, f"write them anew: {how}"
