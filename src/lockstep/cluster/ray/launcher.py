"""Ray launcher: the nodes of a Ray cluster become the hosts of a job (`lockstep run --on ray`).

Ray starts an agent on every node and says which nodes there are. It carries no tensors: agents and
master are connected by mutual TLS, with certificates of a CA that is made for the run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lockstep.cluster.daemon.cluster_messages import FROM_DRIVER, DriverReady, RequestFailed
from lockstep.cluster.daemon.control_socket import LOOK_SECONDS, LocalConnection
from lockstep.cluster.daemon.launcher import ClusterLauncher
from lockstep.errors import (
    JobError,
    PeerClosedError,
    PeerTimeoutError,
    ResourceError,
)
from lockstep.net.certificates import RUN_SECONDS, Role
from lockstep.net.transport import Report, ignore
from lockstep.system.folders import TemporaryFolder
from lockstep.system.messages import Message

START_SECONDS = 60.0
"""How long the driver may take to import Ray and to connect."""
CLOSE_SECONDS = 14.0
"""How long the driver may take to end."""
MASTER = "master"
CLIENT = "ray://"


@contextlib.contextmanager
def on_ray(address: str = "auto", show: Report = ignore) -> Iterator[ClusterLauncher]:
    """A launcher that has an agent on every node of a Ray cluster but this machine's own.

    `address` is that of the cluster's head, `HOST:PORT`, or `auto`: what $RAY_ADDRESS says, or the
    cluster that this machine is a node of. `show` is told of what becomes of agents.

    Raises:
        ResourceError: Ray is not installed.
        JobError: the address is of a kind that cannot be used.
        NetworkError: there is no such cluster, or this machine is no node of it.
    """
    check_ray()
    check_address(address)
    from lockstep.net.certificate_authority import Authority  # needs the extra `net`

    with TemporaryFolder("lockstep-ray-") as folder:
        authority = Authority.open(folder.path / "authority")
        identity = authority.enrol(
            folder.path / "node", MASTER, role=Role.HEAD, seconds=RUN_SECONDS
        )
        with contextlib.closing(DriverConnection(authority.folder, address)) as first:
            first.open(START_SECONDS)
            fresh = [first]

            def dial() -> DriverConnection:
                return fresh.pop() if fresh else DriverConnection(authority.folder, address)

            with ClusterLauncher(identity, first.address, dial, show) as cluster:
                yield cluster


def address_in(on: str) -> str | None:
    """The address of the Ray cluster that `--on` names: `ray` or `ray:ADDRESS`; None: it is none.

    `ray://HOST:PORT`, Ray's own form for its client, is an address as a whole.
    """
    if on.startswith(CLIENT):
        return on
    name, colon, address = on.partition(":")
    if name != "ray":
        return None
    return address if colon else "auto"


def check_ray() -> None:
    """Raise `ResourceError` if Ray is not installed. Does not import it."""
    if importlib.util.find_spec("ray") is None:
        raise ResourceError(
            "a job on Ray needs the package ray",
            expected="the extra `ray`",
            found="no ray in this environment",
            fix="pip install 'lockstep-dlp[ray]', on every node",
        )


def check_address(address: str) -> None:
    """Raise `JobError` if an address leads nowhere, or to Ray's client server.

    Through that the driver runs on the head node, not where the master is: actors would outlive a
    master that dies, for a while, and nothing would say which node is the master's own.
    """
    meant = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    if meant.startswith(CLIENT) or not address:
        raise JobError(
            "this is not an address of a Ray cluster that Lockstep can use",
            expected="ray, or ray:HOST:PORT with the port of the head's GCS, such as 6379",
            found=meant or "none",
            fix="run the job on a node of the cluster, or send it there: ray job submit",
        )


class DriverConnection(LocalConnection):
    """A connection to a driver's process of its own; a `Connection`."""

    def __init__(self, authority: Path, address: str) -> None:
        """The driver signs certificates with the CA in the folder `authority`."""
        ours, self._theirs = socket.socketpair()
        super().__init__("the driver of Ray", ours, FROM_DRIVER)
        self._command = [str(self._theirs.fileno()), str(authority), address]
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""
        """The address of this machine that the other nodes reach it at, once it is open."""

    def open(self, timeout: float) -> None:
        """Start the driver, if it does not run yet, and wait until it is connected to Ray.

        A line that comes back gives it less time than Ray needs on a busy machine; `interrupt`
        ends the wait in any case.

        Raises:
            NetworkError: Ray cannot be reached.
        """
        if self._process is not None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lockstep.cluster.ray.driver", *self._command],
            pass_fds=[self._theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={"RAY_USAGE_STATS_ENABLED": "0", **os.environ},
            start_new_session=True,  # a Ctrl-C is for the master, which hangs up
        )
        self._theirs.close()
        seconds = max(timeout, START_SECONDS)
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            match self.hear():
                case DriverReady(address=address):
                    self.address = address
                    return
                case RequestFailed(error=error):
                    raise error.error()
        raise PeerTimeoutError(
            f"the Ray cluster {self._command[-1]!a} does not answer its driver",
            expected=f"that it is connected within {seconds:g} s",
            fix="see whether Ray answers: ray status",
        )

    def hear(self, seconds: float = LOOK_SECONDS) -> Message | None:
        """The next message; None if nothing has come for so long.

        Raises:
            PeerClosedError: the driver has ended.
        """
        try:
            return super().hear(seconds)
        except PeerClosedError as closed:
            # Ray ends the processes that it cannot connect, or has lost, without an exception.
            lost = "is lost" if self.address else "cannot be reached"
            closed.what = f"the Ray cluster {self._command[-1]!a} {lost}: its driver has ended"
            closed.expected = "a cluster that runs, and that this machine is a node of"
            closed.fix = "see what Ray has said on stderr, and whether it answers: ray status"
            raise

    def close(self) -> None:
        """Hang up, and wait until the driver has ended the agents, and itself. One that is not
        connected yet has none, and may be in Ray's own attempts for long: it is killed."""
        super().close()
        self._theirs.close()
        if self._process is None:
            return
        try:
            self._process.wait(CLOSE_SECONDS if self.address else 0.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
