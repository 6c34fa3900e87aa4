"""Origin mark: a run folder from elsewhere does not name the code that a user runs."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.errors import JobError
from lockstep.results.manifest import check_trusted
from lockstep.results.origin_mark import is_own, mark_of, secret_path
from tests.support.command import lockstep as command

TASK = {"name": "tasks:Task", "args": {"lr": 0.5, "names": ["é", None]}, "importable": True}


@pytest.fixture(autouse=True)
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user who has made no run yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config"


def test_the_secret_is_private_and_stays(config: Path) -> None:
    assert not is_own("", TASK)
    assert not config.exists(), "to look makes none"
    with ThreadPoolExecutor(8) as pool:
        marks = set(pool.map(lambda _: mark_of(TASK), range(16)))
    assert len(marks) == 1, "whoever is first makes it"
    assert [path.name for path in secret_path().parent.iterdir()] == ["run-secret"]
    assert stat.S_IMODE(secret_path().stat().st_mode) == 0o600
    assert is_own(marks.pop(), json.loads(json.dumps(TASK)))


@pytest.mark.parametrize(
    "changes", [{"name": "os:system"}, {"args": {"command": "ls"}}, {"importable": False}]
)
def test_a_mark_is_of_one_task(changes: dict[str, Any]) -> None:
    mark = mark_of(TASK)
    assert is_own(mark, TASK)
    assert not is_own(mark, {**TASK, **changes})
    for other in (None, 5, "", "é", mark[:-1], [mark]):
        assert not is_own(other, TASK)


def test_a_secret_that_others_can_read_counts_for_nothing() -> None:
    mark = mark_of(TASK)
    secret_path().chmod(0o644)
    assert not is_own(mark, TASK)
    assert mark_of(TASK) == ""
    secret_path().chmod(0o600)
    secret_path().write_bytes(b"")
    assert not is_own(mark, TASK)


def test_nowhere_to_keep_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert mark_of(TASK) == ""


def test_recipes_need_no_mark() -> None:
    check_trusted({"source": {"name": "mnist", "args": {}}}, "run")
    with pytest.raises(JobError, match="was not made here by you"):
        check_trusted({"source": {"name": "os:system", "args": {}}}, "run")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A user's own run."""
    folder = tmp_path / "own"
    lockstep.run("tests.support.named_tasks:Blobs", data_epochs=1, out=folder, quiet=True)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    return folder


USES: dict[str, Callable[..., object]] = {
    "verify": lockstep.verify,
    "evaluate": lockstep.evaluate,
    "resume": lockstep.resume,
    "predict": lambda run, **more: lockstep.predict(run, "none.jsonl", out="rows.jsonl", **more),
}


def test_a_run_from_elsewhere(made: Path, tmp_path: Path) -> None:
    lockstep.verify(made)
    shutil.copytree(made, tmp_path / "copy")
    lockstep.verify(tmp_path / "copy")  # it is the user's own still
    manifest = json.loads((made / "manifest.json").read_text())
    ran = tmp_path / "ran"
    manifest["source"].update(name="os:system", args={"command": f"touch {ran}"})
    theirs = tmp_path / "copy"
    (theirs / "result.json").unlink()
    (theirs / "manifest.json").write_text(json.dumps(manifest))
    for use in USES.values():
        with pytest.raises(JobError, match="was not made here by you"):
            use(theirs)
    for name in ("verify", "evaluate", "resume"):
        done = command(name, str(theirs), cwd=tmp_path)
        assert done.returncode != 0
        assert "--trust" in done.stderr
    assert not ran.exists()


def test_whoever_is_trusted(made: Path, config: Path) -> None:
    shutil.rmtree(config)
    with pytest.raises(JobError, match="was not made here by you"):
        lockstep.verify(made)
    assert lockstep.verify(made, trust=True).final
