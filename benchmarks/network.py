"""The network: bytes per second between two processes on loopback, in both directions at once.

    python -m benchmarks.network

Both send and both receive in every round, which ends when all of it is in place. `plain` is the
same code as `tcp` without TLS; nothing but this measurement uses it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lockstep.net.certificate_authority import Authority
from lockstep.net.connections import Incoming, Item, Outgoing, Stream
from lockstep.net.frames import Kind, head
from lockstep.net.identity import Identity
from lockstep.net.pending import ExpectedTensors, sending
from lockstep.net.sockets import end, listen
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import Key, Pending

NAMES = ("a", "b")
LIMIT = 60.0


class Plain:
    """The connections for tensors of two hosts, without TLS and without a handshake."""

    def __init__(self, node: str, pipe: Connection) -> None:
        peer = NAMES[1 - NAMES.index(node)]
        with listen("127.0.0.1", 0) as listener:
            pipe.send(listener.getsockname())
            self._to = socket.create_connection(pipe.recv())
            self._from, _ = listener.accept()
        self._to.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._expected = ExpectedTensors(peer, str)
        self._outgoing = Outgoing(self._to, peer, lambda error: None)
        self._thread = threading.Thread(target=self._receive, args=(peer,))
        self._thread.start()

    def _receive(self, peer: str) -> None:
        incoming = Incoming(self._from, peer, Stream.DATA, self._expected.await_target)
        incoming.run(lambda frame: self._expected.arrived(frame.header))

    def send(self, peer: str, key: Key, data: memoryview) -> Pending:
        transfer = sending(peer, key)
        start = head(key.kind, step=key.step, tag=key.tag, length=len(data))
        self._outgoing.send(Item(head=start, body=data, transfer=transfer))
        return transfer

    def expect(self, peer: str, key: Key, into: memoryview) -> Pending:
        return self._expected.expect(key, into)

    def close(self) -> None:
        self._outgoing.finish(LIMIT)
        self._thread.join(LIMIT)
        end(self._from)
        for sock in (self._to, self._from):
            sock.close()


def open_tcp(node: str, peer: str, pipe: Connection, folder: Path) -> TcpTransport:
    transport = TcpTransport(Identity.load(folder / node), job="bench", facts={})
    pipe.send(transport.address)
    transport.connect({peer: pipe.recv()}, LIMIT)
    return transport


def open_gloo(node: str, pipe: Connection) -> Any:
    from torch._C._distributed_c10d import TCPStore

    from lockstep.net.gloo_transport import GlooTransport

    first, limit = node == NAMES[0], timedelta(seconds=LIMIT)
    port = 0 if first else pipe.recv()
    store = TCPStore("127.0.0.1", port, None, first, limit, wait_for_workers=False)
    if first:
        pipe.send(store.port)
    return GlooTransport(NAMES, store, node=node, job="bench", facts={}, timeout=LIMIT)


def side(
    kind: str, node: str, pipe: Connection, folder: Path, size: int, rounds: int
) -> list[float]:
    """One of the two processes; returns the seconds of every round."""
    peer = NAMES[1 - NAMES.index(node)]
    transport: Any
    if kind == "tcp":
        transport = open_tcp(node, peer, pipe, folder)
    else:
        transport = open_gloo(node, pipe) if kind == "gloo" else Plain(node, pipe)
    data, into, seconds = bytearray(size), bytearray(size), []
    for step in range(rounds + 1):
        began, key = time.perf_counter(), Key(Kind.PARTIAL, step)
        receipt = transport.expect(peer, key, memoryview(into))
        sent = transport.send(peer, key, memoryview(data))
        receipt.wait(LIMIT)
        sent.wait(LIMIT)
        seconds.append(time.perf_counter() - began)
    pipe.send("done")
    pipe.recv()  # the other has everything as well
    transport.close()
    return seconds[1:]


def measure(kind: str, size: int, rounds: int, folder: Path) -> list[float]:
    """Seconds of every round, as the first process saw them."""
    context = multiprocessing.get_context("spawn")
    left, right = context.Pipe()
    other = context.Process(target=side, args=(kind, "b", right, folder, size, rounds))
    other.start()
    seconds = side(kind, "a", left, folder, size, rounds)
    other.join(LIMIT)
    return seconds


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=["tcp", "plain", "gloo"])
    parser.add_argument("--megabytes", type=float, default=25.0, help="each way")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    size = int(options.megabytes * 1e6)
    with tempfile.TemporaryDirectory(prefix="lockstep-network-") as folder:
        authority = Authority.open(Path(folder, "authority"))
        for node in NAMES:
            authority.enrol(Path(folder, node), node)
        for kind in options.kinds:
            found = measure(kind, size, options.rounds, Path(folder))
            rates = sorted(size / 1e6 / seconds for seconds in found)
            print(
                f"{kind}: {statistics.median(rates):,.0f} MB/s each way"
                f" ({rates[0]:,.0f} to {rates[-1]:,.0f}, {len(rates)} rounds)"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
