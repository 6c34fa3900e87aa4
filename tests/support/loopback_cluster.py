"""A cluster on this machine: `up` and `join` as users have them, talking over loopback."""

from __future__ import annotations

import contextlib
import queue
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.cluster.daemon.cluster_messages import (
    AskHosts,
    AskToken,
    HostsAnswer,
    JobState,
    TokenAnswer,
)
from lockstep.cluster.daemon.control_socket import ask
from lockstep.cluster.daemon.launcher import ClusterLauncher
from tests.support.command import TASKS
from tests.support.daemons import Daemon


class Loopback:
    """A cluster on this machine: every host's state folder has its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[Daemon] = []
        shutil.copy(TASKS, folder / "blobs.py")

    def start(self, *arguments: str | Path, said: str = "") -> Daemon:
        daemon = Daemon(*arguments, cwd=self.folder, said=said)
        self.daemons.append(daemon)
        return daemon

    def up(self) -> Daemon:
        daemon = self.start("up", "--state", "a", "--name", "a", "--tokens", "0")
        daemon.until("`lockstep up` at 127.0.0.1:")
        self.centre = daemon
        return daemon

    def token(self, *, valid: float = 900.0) -> str:
        return ask(self.folder / "a", AskToken(seconds=valid), TokenAnswer).token

    def member(self, name: str, *arguments: str) -> Daemon:
        """A host that has joined; it gets its token on stdin."""
        daemon = self.start(
            "join", "-", "--state", name, "--name", name, "-w", "1", *arguments, said=self.token()
        )
        self.centre.until(f"{name}: takes jobs, with 1 workers")
        daemon.until("waits for jobs")
        return daemon

    def launcher(
        self, reports: queue.SimpleQueue[tuple[str, str]] | None = None
    ) -> ClusterLauncher:
        shown = reports or queue.SimpleQueue()
        return ClusterLauncher.of_this_machine(self.folder / "a", lambda *said: shown.put(said))

    def hosts(self) -> dict[str, dict[str, JobState]]:
        """By host, what it says of each job."""
        answer = ask(self.folder / "a", AskHosts(), HostsAnswer)
        return {host.name: host.jobs for host in answer.hosts}

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            for daemon in self.daemons:
                stack.enter_context(daemon)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Loopback]:
    made = Loopback(tmp_path)
    with contextlib.closing(made):
        yield made
