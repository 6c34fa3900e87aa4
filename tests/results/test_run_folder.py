"""Run folders that cannot be made, found before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockstep.errors import RunFolderError
from lockstep.results.run_folder import RunFolder


def test_names_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be made") as caught:
        RunFolder.check_free(tmp_path / ("x" * 300))
    assert "File name too long" in caught.value.found
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(RunFolderError, match="exists"):
        RunFolder.check_free(tmp_path / "link")
    RunFolder.check_free(tmp_path / "new" / "run")
    RunFolder.check_free(None)


def test_a_folder_that_may_not_be_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "lstat", forbidden)
    with pytest.raises(RunFolderError, match="cannot be made") as caught:
        RunFolder.check_free(tmp_path / "run")
    assert "Permission denied" in caught.value.found


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves `~` alone in `--out=~/run`, and Python does so anyway."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder.create("~/run", "job").path == tmp_path / "run"
    with pytest.raises(RunFolderError, match="exists"):
        RunFolder.check_free("~/run")
