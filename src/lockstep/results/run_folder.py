"""Run folder: the files of one run.

manifest.json      the job, the plan, the numerics profile, the task's code digest
events.jsonl       what happened, when (see `event_schema`)
live.jsonl         while it goes on: its pace just now, in the same form
control.sock       while it goes on: where requests are taken
ledger.jsonl       what was committed
checkpoints/       the state at some steps
model.safetensors  the trained model
result.json        the result
report.html        the result as a page
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lockstep.errors import RunFolderError, disk_errors
from lockstep.system.folders import user_path
from lockstep.system.json_files import plain, write_json


class RunFolder:
    """Run folder: paths of the files of one run, and the manifest."""

    def __init__(self, path: Path) -> None:
        self._set_path(path)

    def _set_path(self, path: Path) -> None:
        self.path = path
        self.manifest_path = path / "manifest.json"
        self.events_path = path / "events.jsonl"
        self.live_path = path / "live.jsonl"
        self.ledger_path = path / "ledger.jsonl"
        self.checkpoints = path / "checkpoints"
        self.model_path = path / "model.safetensors"
        self.result_path = path / "result.json"

    @classmethod
    def create(cls, out: str | os.PathLike[str] | None, label: str) -> RunFolder:
        """Make a new run folder: `out`, or the next free `runs/LABEL-NUMBER`. It is for its owner
        alone.

        Raises:
            RunFolderError: `out` exists already, or cannot be made.
        """
        path = user_path(out or "runs")
        try:
            if out is not None:
                path.mkdir(mode=0o700, parents=True)
                return cls(path)
            number = 1
            while True:
                path = Path("runs") / f"{label}-{number}"
                try:
                    path.mkdir(mode=0o700, parents=True)
                    return cls(path)
                except FileExistsError:
                    number += 1
        except FileExistsError:
            raise _exists(str(out)) from None
        except OSError as error:
            raise _unmakeable(path, error) from error

    @staticmethod
    def check_free(out: str | os.PathLike[str] | None) -> None:
        """Raise `RunFolderError` if `out` exists or cannot be made, before anything is started."""
        if out is None:
            return
        try:
            user_path(out).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return  # the latter is said when it is made
        except OSError as error:  # a name too long, or a folder that may not be entered
            raise _unmakeable(user_path(out), error) from None
        raise _exists(str(out))

    def __enter__(self) -> RunFolder:
        """Lock the run for this coordinator until the end of the block.

        Raises:
            RunFolderError: another process holds the lock.
        """
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise RunFolderError(
                f"another master is at work in {self.path}",
                expected="one master per run",
                fix="wait for it, or stop it",
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def check_there(self) -> None:
        """Check that the locked folder is where it was. If it was moved, the paths follow it.

        Raises:
            RunFolderError: it was moved or removed.
        """
        held, was = os.fstat(self._lock), self.path
        with contextlib.suppress(OSError):
            if os.path.samestat(held, was.stat()):
                return
        now = Path(os.readlink(f"/proc/self/fd/{self._lock}"))
        with contextlib.suppress(OSError):
            if os.path.samestat(held, now.stat()):
                self._set_path(now)
                raise RunFolderError(
                    f"the run folder {was} was moved while the run went on",
                    expected="a folder that stays where it is until the run has ended",
                    found=f"it is {now} now",
                )
        raise RunFolderError(
            f"the run folder {was} was removed while the run went on",
            expected="a folder that stays where it is until the run has ended",
            fix="start the run again",
        )

    def check_unfinished(self) -> None:
        """Raise `RunFolderError` if the run has a result."""
        if self.result_path.exists():
            raise RunFolderError(
                f"the run in {self.path} has finished",
                fix=f"look at {self.result_path}, or start another run",
            )

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder.

        Raises:
            RunFolderError: there is none.
        """
        folder = cls(user_path(path))
        if not folder.manifest_path.is_file():
            raise RunFolderError(
                f"{path} is not a run folder",
                expected="a folder with a manifest.json",
                found="none" if not folder.path.exists() else "no manifest.json",
                fix="give the folder that `lockstep run` printed",
            )
        return folder

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        with disk_errors("the manifest"):
            write_json(self.manifest_path, manifest)

    def read_manifest(self) -> dict[str, Any]:
        """The manifest.

        Raises:
            RunFolderError: it is not readable.
        """
        try:
            manifest: dict[str, Any] = json.loads(self.manifest_path.read_text())
        except ValueError as error:
            raise RunFolderError(f"{self.manifest_path} is not readable: {error}") from error
        return manifest


def _exists(out: str) -> RunFolderError:
    return RunFolderError(
        f"the run folder {out} exists",
        expected="a path that does not exist",
        fix=f"choose another, or resume it: lockstep resume {out}",
    )


def _unmakeable(path: Path, error: OSError) -> RunFolderError:
    return RunFolderError(
        f"the run folder {path} cannot be made",
        expected="a place that can be written to",
        found=str(error),
        fix="choose another, with --out or out=",
    )


class Events:
    """Event log: appends lines of a time, an event and its fields (see `event_schema`)."""

    def __init__(self, path: Path | None) -> None:
        with disk_errors("the list of events"):
            torn = path is not None and _is_torn(path)
            self._file = path.open("a", encoding="utf-8", buffering=1) if path else None
            if torn and self._file is not None:
                self._file.write("\n")  # what a crash has cut off stays a line of its own

    def add(self, event: str, **fields: Any) -> None:
        if self._file is not None:
            with disk_errors("the list of events"):
                self._file.write(event_line(event, fields))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def event_line(event: str, fields: Mapping[str, Any]) -> str:
    """A line of `events.jsonl`, of something that has happened now, or at the field `time`."""
    return json.dumps(plain({"time": utc_now(), "event": event, **fields})) + "\n"


def utc_now() -> str:
    """The time, as events have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _is_torn(path: Path) -> bool:
    """Whether a file ends within a line."""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # there is none, or it is empty
        return False
