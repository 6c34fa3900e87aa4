"""`up` and hosts or callers that send what cannot be: they are dropped, and it goes on."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.agent.job_offer import JobOffer
from lockstep.cluster.daemon.cluster_messages import (
    AskHosts,
    HostsAnswer,
    JobOffered,
    JobWithdrawn,
    OpenJob,
    TakeJobs,
    TokenAnswer,
)
from lockstep.cluster.daemon.control_socket import SOCKET, ask
from lockstep.cluster.daemon.reconnecting_line import HostConnection
from lockstep.cluster.state_folder import Home
from lockstep.errors import LockstepError, ProtocolError
from lockstep.net.connections import Item, Stream
from lockstep.net.frames import Kind, head
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import ignore
from lockstep.system.messages import encode
from lockstep.system.unix_socket import LENGTH, MAX_BYTES
from tests.support.message_values import body, fields_of, nested
from tests.support.no_descriptors import no_descriptors
from tests.support.up_here import LIMIT, Up

OFFER = OpenJob(offer=JobOffer(job="j", master="b", address=("127.0.0.1", 9), task="mnist"))


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    made = Up(tmp_path)
    with contextlib.closing(made):
        yield made


def tell_raw(transport: TcpTransport, content: bytes) -> None:
    """Send bytes in the place of a message."""
    sender = transport._peer("a", "").sender(Stream.CONTROL, "")
    sender.send(Item(head=head(Kind.CONTROL, length=len(content)) + content))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x91" * 900,
        b"[" * 900,
        body({"op": "TakeJobs", "workers": 1e300}),
        body({"op": "TakeJobs", "workers": -1}),
        body({"op": "AskToken", "seconds": 1.0}),
        body({**fields_of(OFFER), "more": 1}),
        body({"op": "OpenJob", "offer": {**fields_of(OFFER.offer), "address": ["x", math.inf]}}),
        body({"op": "OpenJob", "offer": {**fields_of(OFFER.offer), "args": {"x": nested(900)}}}),
        body({"op": "OpenJob", "offer": {**fields_of(OFFER.offer), "job": "\x1b[2J"}}),
        encode(OFFER).replace(b"mnist", b"m\xed\xa0\x80t"),
    ],
)
def test_hosts_that_send_what_cannot_be(up: Up, content: bytes) -> None:
    with up.host("c") as other:
        with up.host("b") as host:
            tell_raw(host, content)
            why = up.until("a message is not as expected")
            assert all(char.isprintable() or char == "\n" for char in why)
        other.tell("a", TakeJobs(workers=1))
        up.until("takes jobs")
        assert [row.name for row in ask(up.folder, AskHosts(), HostsAnswer).hosts] == ["c"]
    up.check()


def test_a_job_of_another_host_is_refused(up: Up) -> None:
    with up.host("c") as host:
        host.tell("a", OFFER)
        up.until("a job is offered by another host than its master")
    up.check()


def test_many_long_messages_wait(up: Up) -> None:
    """They are not kept all at once."""
    with up.host("b") as host:
        args: dict[str, Any] = {"x": "x" * 900_000}
        for number in range(40):
            offer = JobOffer(
                job=f"j{number}", master="c", address=("127.0.0.1", 9), task="mnist", args=args
            )
            host.tell("a", OpenJob(offer=offer))
        up.until("a job is offered by another host than its master")
        up.check()


@pytest.mark.parametrize(
    "content",
    [
        b"[[[[" * 100,
        b'{"op": "token", "seconds": 1e999}\n',
        LENGTH.pack(MAX_BYTES + 1),
        LENGTH.pack(0),
        LENGTH.pack(4) + b"\x91" * 4,
        *(
            LENGTH.pack(len(found)) + found
            for found in (
                body({"op": "AskToken", "seconds": math.inf}),
                body({"op": "AskToken", "seconds": math.nan}),
                body({"op": "AskToken", "seconds": -1}),
                body({"op": "TakeJobs", "workers": 1}),
                body(nested(900)),
            )
        ),
    ],
)
def test_callers_that_send_what_cannot_be(up: Up, content: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(up.folder / SOCKET))
        sock.settimeout(LIMIT)
        sock.sendall(content)
        assert b"RequestFailed" in sock.recv(1 << 16)  # and then it is closed
        with contextlib.suppress(ConnectionError):
            assert sock.recv(1 << 16) == b""
    up.check()


def test_a_member_obeys_its_up_alone(up: Up) -> None:
    home = Home(node="a", address=up.head.address)
    line = HostConnection(up.identity("b"), home, "127.0.0.1", ignore)
    with contextlib.closing(line), up.host("c") as other:
        line.open(LIMIT)
        with pytest.raises(LockstepError):  # b does not connect back to it
            other.connect({"b": line._transport.address}, 0.5)
        with contextlib.suppress(LockstepError):
            other.tell("b", JobWithdrawn(job="j"))
        with contextlib.suppress(LockstepError):
            other.tell("b", JobOffered(offer=OFFER.offer))
        assert line.hear() is None
    up.check()


def test_callers_without_threads_or_descriptors(up: Up, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name.startswith("lockstep @"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(LockstepError):
            up.check()
    up.check()
    with socket.socket(socket.AF_UNIX) as sock, no_descriptors():
        sock.connect(str(up.folder / SOCKET))
        time.sleep(0.2)
    up.check()


def test_an_answer_that_was_not_asked_for(up: Up) -> None:
    with pytest.raises(ProtocolError, match="another answer"):
        ask(up.folder, AskHosts(), TokenAnswer)
