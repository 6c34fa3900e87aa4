"""One small message on a socket before a deadline, and a socket's errors in our words."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any

from lockstep.errors import PeerClosedError, PeerTimeoutError, ProtocolError, RefusedError
from lockstep.net.frames import Kind, Reader, message_frame
from lockstep.net.tls_stream import Deadline, TlsStream
from lockstep.system.messages import Codec, Message

SILENCE_SECONDS = 20.0
"""After which a machine that acknowledges nothing counts as dead."""
_ABOUT_CERTIFICATES = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED")
"""What is in the names of TLS alerts by which a peer refuses a certificate."""


@contextlib.contextmanager
def peer_errors(who: str, what: str, seconds: float) -> Iterator[None]:
    """Turn a socket's errors into ours. `what` was waited for, for at most so many seconds."""
    try:
        yield
    except TimeoutError as error:
        raise PeerTimeoutError(
            f"{who} did not answer in time", expected=f"{what} within {seconds:g} s"
        ) from error
    except ssl.SSLCertVerificationError as error:
        raise RefusedError(
            f"the certificate of {who} is not accepted",
            expected="one of this cluster's CA that is valid now",
            found=error.verify_message,
            fix="join the cluster again with a new token; see that the clocks agree",
        ) from error
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        if isinstance(error, ssl.SSLEOFError):
            raise closed(who, what, "the end of the stream") from error
        if any(part in reason for part in _ABOUT_CERTIFICATES):
            raise RefusedError(
                f"{who} has no certificate that both accept",
                expected="one of this cluster's CA that is valid now",
                found=reason,
                fix="join the cluster again with a new token",
            ) from error
        raise ProtocolError(
            f"{who} does not speak TLS 1.3 as expected", expected=what, found=reason
        ) from error
    except OSError as error:
        raise closed(who, what, str(error)) from error


def closed(who: str, what: str, found: str) -> PeerClosedError:
    """The error of a connection that is gone."""
    return PeerClosedError(
        f"{who} closed the connection",
        expected=what,
        found=found,
        fix="see whether that host's process died",
    )


def send_message(sock: TlsStream, kind: Kind, message: Message | None, deadline: Deadline) -> None:
    """Send a message, or a frame without one. Raises what sockets raise."""
    sock.deadline = deadline
    sock.sendall(message_frame(kind, message))


def receive_message(
    sock: TlsStream, kinds: Mapping[Kind, Codec[Any] | None], deadline: Deadline
) -> tuple[Kind, Any]:
    """The next message, and not a byte that follows it. Raises what sockets raise.

    `kinds`: which frames may come, and what decodes the message of each; None: it has none.

    Raises:
        ProtocolError: it breaks a rule, or is of none of these kinds.
        TimeoutError: it has not come by the deadline, however many bytes trickle in.
    """
    reader = Reader(kinds)
    while True:
        sock.deadline = deadline
        count = sock.recv_into(reader.room())
        if not count:
            raise ConnectionError(f"the end of the stream after {reader.describe()}")
        frame = reader.took(count)
        if frame is not None:
            codec = kinds[frame.header.kind]
            return frame.header.kind, None if codec is None else codec.decode(frame.body)


def wrap(sock: socket.socket, context: ssl.SSLContext, *, server: bool) -> TlsStream:
    """The socket with TLS, before its handshake. `sock` is of no use from then on."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A step's gradients are a burst, which BBR paces by its estimate of the link: with it, where it
    # is the system's default, a link of 100 Mbit/s was idle for a tenth of the time.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
    return TlsStream(sock, context, server=server)


def handshake(sock: TlsStream, deadline: Deadline) -> None:
    """Do TLS's handshake, however few bytes come at a time, by the deadline or not at all."""
    sock.deadline = deadline
    sock.do_handshake()


def notice_silence(sock: socket.socket, seconds: float = SILENCE_SECONDS) -> None:
    """Let the kernel end the connection when the peer's machine acknowledges nothing so long.

    A process that is stopped is not noticed: its kernel goes on acknowledging.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(seconds / 3)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(seconds / 6)))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


def end(sock: socket.socket) -> None:
    """Wake whoever is blocked on the socket; the owner still has to close it."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def has_hung_up(sock: socket.socket) -> bool:
    """Whether the other side sends nothing more, though perhaps not all is read."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Port 0 lets the kernel choose."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def address_of(sock: socket.socket) -> tuple[str, int]:
    """Where a listening socket can be reached."""
    host, port = sock.getsockname()[:2]
    return str(host), int(port)
