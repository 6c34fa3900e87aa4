"""Reconnecting line: a connection to `up` that is opened again, by a thread, when it is lost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol

from lockstep.cluster.daemon.certificate_renewal import CertificateRenewal
from lockstep.cluster.daemon.cluster_messages import FROM_UP
from lockstep.cluster.state_folder import Home, check_certificate
from lockstep.errors import (
    IdentityError,
    LockstepError,
    NetworkError,
    PeerTimeoutError,
    RefusedError,
)
from lockstep.net.certificates import Role
from lockstep.net.identity import Identity
from lockstep.net.sockets import closed
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import Report
from lockstep.system.messages import Message

JOB = "cluster"
"""The job of the connections between `up` and its hosts."""
CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 20.0
"""The longest that a connection may take to end: longer than a connect, and than Ray's driver."""
LOOK_SECONDS = 0.5
SHORTEST_PAUSE, LONGEST_PAUSE = 0.2, 10.0


class Connection(Protocol):
    """A connection to `up`, of whatever kind. Opened, heard and closed by one thread."""

    def open(self, timeout: float) -> None:
        """Connect. Raises `NetworkError`."""

    def tell(self, message: Message) -> None:
        """Send a message, from any thread. Raises `NetworkError`."""

    def hear(self) -> Message | None:
        """The next message; None if nothing has come for a moment. Raises `NetworkError`."""

    def interrupt(self) -> None:
        """Let whoever waits in `open` or `hear` return. May be called from any thread."""

    def close(self) -> None:
        """Leave nothing open."""


@dataclass(frozen=True)
class Connected:
    """The line is there."""


@dataclass(frozen=True)
class Received:
    """`up` has sent a message."""

    message: Message


@dataclass(frozen=True)
class Lost:
    """The line is not there; unless that is final, it is tried again."""

    error: LockstepError
    final: bool


LineEvent = Connected | Received | Lost


class ReconnectingLine:
    """Tells of what happens on it, once started, by calling `put` in its thread."""

    def __init__(self, dial: Callable[[], Connection], put: Callable[[LineEvent], None]) -> None:
        self._dial, self._put = dial, put
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._thread = threading.Thread(target=self._run, name="lockstep line", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def tell(self, message: Message) -> None:
        """Send a message; in vain while the line is lost: `Connected` says when to repeat it."""
        with self._lock:
            connection = self._connection
        if connection is not None:
            with contextlib.suppress(NetworkError):
                connection.tell(message)

    def close(self) -> None:
        """Close it. Leaves no thread and no descriptor, but perhaps for seconds in a connect."""
        self._closing.set()
        with self._lock:
            connection = self._connection
        if connection is not None:
            connection.interrupt()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        failures = 0
        while not self._closing.is_set():
            connected, final = False, False
            try:
                with contextlib.closing(self._dial()) as connection:
                    with self._lock:
                        self._connection = connection
                    connection.open(CONNECT_SECONDS)
                    connected = True
                    self._put(Connected())
                    self._listen(connection)
            except LockstepError as error:
                final = isinstance(error, RefusedError | IdentityError)
                if not self._closing.is_set():
                    self._put(Lost(error, final))
            finally:
                with self._lock:
                    self._connection = None
            if final:
                return
            failures = 0 if connected else failures + 1
            self._closing.wait(pause(failures))

    def _listen(self, connection: Connection) -> None:
        while not self._closing.is_set():
            message = connection.hear()
            if message is not None:
                self._put(Received(message))


def pause(failures: int) -> float:
    """Seconds until the next attempt, after so many in a row that were in vain."""
    return float(min(SHORTEST_PAUSE * 2.0 ** min(failures, 30), LONGEST_PAUSE))


class HostConnection:
    """The connection of a host with a certificate, which is renewed over it; a `Connection`."""

    def __init__(self, identity: Identity, home: Home, host: str, report: Report) -> None:
        """`report` is told of what becomes of the certificate; of a connection that ends the line
        itself tells."""
        self._home, self._identity = home, identity
        self._renewal = CertificateRenewal(identity, report)
        try:
            self._transport = TcpTransport(
                identity, job=JOB, facts=facts(), codec=FROM_UP, host=host,
                roles=frozenset({Role.HEAD}),
            )  # fmt: skip
        except OSError as error:
            raise IdentityError(
                f"this host cannot listen on {host}",
                found=str(error),
                fix="give an address of this machine with --host",
            ) from None

    def open(self, timeout: float) -> None:
        try:
            self._transport.connect({self._home.node: self._home.address}, timeout)
        except RefusedError:
            check_certificate(self._identity)  # that says more
            raise

    def tell(self, message: Message) -> None:
        self._transport.tell(self._home.node, message)

    def hear(self) -> Message | None:
        if (asked := self._renewal.due(time.monotonic())) is not None:
            self.tell(asked)
        try:
            heard = self._transport.hear(LOOK_SECONDS)
        except PeerTimeoutError:
            if self._home.node not in self._transport.peers:
                raise closed(f"host {self._home.node}", "more messages", "no connection") from None
            return None
        if heard.peer != self._home.node:  # another member: who is no `up` has nothing to say
            if heard.message is not None:
                self._transport.drop(heard.peer, "it is not the host that `lockstep up` runs on")
            return None
        if heard.error is not None:
            raise heard.error
        assert heard.message is not None
        return None if self._renewal.take(heard.message) else heard.message

    def interrupt(self) -> None:
        self._transport.close()

    def close(self) -> None:
        self._transport.close()


def facts() -> dict[str, str]:
    """What has to be the same on all hosts of a cluster."""
    return {"lockstep-dlp": metadata.version("lockstep-dlp")}
