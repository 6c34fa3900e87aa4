"""A Ray cluster on this machine, of several nodes: `python -m tests.support.ray_cluster N`, and
its user.

Ray's processes have another mark than the tests', because they outlive each of them. Those of
Lockstep among them have to be gone when a job has ended.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.conftest import MARK, describe, environment_of, parent_of, processes
from tests.support.harmed_runs import until

ROOT = Path(__file__).parents[2]
LIMIT = 120.0
GATE = "LOCKSTEP_TEST_GATE"
"""Names a file; while it is there, jobs of `tests.support.gated_task` go slowly."""


class RayNodes:
    """Ray's processes, and what they have started."""

    def __init__(self, nodes: int, environment: dict[str, str]) -> None:
        """Start so many nodes, with one CPU each; `environment` is for their clients, too."""
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets: a short path
        self.gate = self.folder / "gate"
        (self.folder / "t").mkdir()
        token = self.folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            GATE: str(self.gate),
            **environment,
        }
        mark = secrets.token_hex(16)
        self.mark = f"{MARK}={mark}".encode()
        own = {
            MARK: mark,
            "TMPDIR": str(self.folder / "t"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.ray_cluster", str(nodes)],
            cwd=ROOT,
            env={**os.environ, **self.environment, **own},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "log").open("wb"),
            text=True,
        )
        try:
            self.address = self._answer()
        except BaseException:
            self.close()
            raise

    def _answer(self) -> str:
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        assert said, (self.folder / "log").read_text()
        return said

    def _ask(self, request: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._answer()

    def add(self) -> None:
        """Add a node."""
        assert self._ask("add") == "added"

    def _all(self) -> list[int]:
        """Ray's processes, and what they have started; not the tests' own children."""
        return [pid for pid in sorted(processes(self.mark)) if self.mark in environment_of(pid)]

    def found(self, word: str) -> list[int]:
        """The processes whose command has this word."""
        return [pid for pid in self._all() if word in describe(pid)]

    def kill_node(self, pid: int) -> None:
        """Kill the node that a process runs on: its raylet, and everything that this has started.

        All of it is stopped before any of it dies, as on a machine that loses its power.
        """
        while "raylet/raylet" not in describe(pid):
            pid = parent_of(pid)
            assert pid, "the process is on no node"
        family = [pid]
        for each in family:  # grows meanwhile
            os.kill(each, signal.SIGSTOP)
            family += [child for child in self._all() if parent_of(child) == each]
        for each in family:
            os.kill(each, signal.SIGKILL)

    def kill_head(self) -> None:
        """Kill the head: the GCS, which knows all, and the node that is on its machine."""
        (gcs,) = self.found("gcs/gcs_server")
        (head,) = self.found("node:__internal_head__")
        os.kill(gcs, signal.SIGKILL)
        self.kill_node(head)

    def ours(self) -> list[str]:
        """The processes there that are of Lockstep, in words."""
        return [describe(pid) for word in ("lockstep", "RayAgent") for pid in self.found(word)]

    def files(self) -> list[Path]:
        """What Lockstep has in the folder for temporary files."""
        return sorted((self.folder / "t").glob("lockstep*"))

    def await_end(self, files: list[Path] | None) -> None:
        """Wait until nothing is there but these files; with None, files do not matter. What others
        have left, whose actors were killed, may have been removed meanwhile."""
        left = lambda: [] if files is None else set(self.files()).difference(files)  # noqa: E731
        gone = lambda: not self.ours() and not left()  # noqa: E731
        try:
            until(gone, LIMIT, "that agents and actors are gone")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.ours()} {self.files()}") from None

    def close(self) -> None:
        """End all of it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(LIMIT)
        finally:
            self._process.kill()
            self._process.stdout.close()
            for pid in self._all():
                os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.folder)


def main() -> None:
    """Start nodes, and more when stdin says so; end them with it."""
    from ray.cluster_utils import Cluster

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cluster = Cluster(shutdown_at_exit=False)

    def add() -> None:
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False)

    for _ in range(int(sys.argv[1])):
        add()
    print(cluster.address, file=out, flush=True)
    for line in sys.stdin:
        assert line == "add\n"
        add()
        print("added", file=out, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
