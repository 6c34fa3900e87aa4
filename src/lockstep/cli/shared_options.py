"""Shared options: those of several commands, and the launcher that `--on` names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cli import cluster_commands as commands
from lockstep.errors import RunInterrupted

if TYPE_CHECKING:
    from lockstep.coordinator.launcher import Launcher

WITH_ARGS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Of a command whose other options are a task's arguments."""
On = Annotated[
    str | None,
    typer.Option(
        "--on", help="Run on other hosts too: up, ray, ray:ADDRESS, or a file with a join token."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@contextlib.contextmanager
def launcher_of(on: str | None, state: Path | None) -> Iterator[Launcher | None]:
    """The launcher that `--on` names, or None. An interruption within becomes an error, since typer
    would drop its message."""
    try:
        with contextlib.ExitStack() as stack:
            if on is None:
                yield None
                return
            from lockstep.cli.launchers import open_launcher

            yield stack.enter_context(open_launcher(on, state, commands.report))
    except RunInterrupted as interrupted:
        raise interrupted.stopped from None
