"""Run list: the run folders that may be seen, by name.

A name is looked up among those that were found, and never made into a path.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from lockstep.errors import LockstepError, RunFolderError
from lockstep.results.run_reader import RunReader
from lockstep.system.folders import user_path

MOST_RUNS = 1000
"""The newest; older ones are not listed."""


class RunList:
    """Run list: one run, or those in a folder of runs."""

    def __init__(self, path: str | Path) -> None:
        """`path`: a run folder, or a folder of these.

        Raises:
            RunFolderError: it is neither.
        """
        self.path = user_path(path).resolve()
        self.single = (self.path / "manifest.json").is_file()
        if not self.single and not self.path.is_dir():
            raise RunFolderError(
                f"{path} is no folder of runs, and no run folder",
                expected="a folder that `lockstep run` made, or the one with all of them",
                found="nothing there" if not self.path.exists() else "a file",
                fix="give the folder; the default is runs/ where you are",
            )
        self._readers: dict[str, RunReader] = {}

    def find(self, name: str) -> Path | None:
        """The folder of the run of this name."""
        return self.folders().get(name)

    def folders(self) -> dict[str, Path]:
        """The run folders by name, the newest first."""
        if self.single:
            return {self.path.name: self.path}
        found = []
        with contextlib.suppress(OSError):
            for folder in self.path.iterdir():
                with contextlib.suppress(OSError):
                    found.append(((folder / "manifest.json").stat().st_mtime, folder))
        found.sort(reverse=True)
        return {folder.name: folder for _, folder in found[:MOST_RUNS]}

    def summaries(self) -> list[dict[str, Any]]:
        """A summary of each run, the newest first; those that cannot be read are left out."""
        folders, rows = self.folders(), []
        for name in self._readers.keys() - folders.keys():
            del self._readers[name]
        for name, folder in folders.items():
            reader = self._readers.setdefault(name, RunReader(folder, ends_only=True))
            with contextlib.suppress(LockstepError):
                reader.refresh()
                rows.append(reader.summary(name))
        return rows
