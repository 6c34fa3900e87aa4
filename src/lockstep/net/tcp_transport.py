"""TCP transport: between hosts, with mutual TLS 1.3.

Each host listens. For every peer there are four connections, one for each direction of each stream
(see `connections`): two that this host opens in `connect`, and two that the peer opens. Each begins
with a hello and a welcome, in which both sides compare their facts.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
from collections.abc import Mapping
from typing import Any

from lockstep.errors import (
    IdentityError,
    NetworkError,
    PeerClosedError,
    PeerTimeoutError,
    ProtocolError,
    RefusedError,
)
from lockstep.net.arrivals import Arrivals
from lockstep.net.certificates import EVERY_ROLE, Role
from lockstep.net.connections import Incoming, Item, Outgoing, Stream
from lockstep.net.frames import Kind, head, message_frame
from lockstep.net.handshake import (
    HELLO,
    REFUSAL,
    Facts,
    Hello,
    Refusal,
    check_hello,
    peer_address,
)
from lockstep.net.identity import Identity, PeerIdentity, RenewedContext, peer_identity
from lockstep.net.peer import Peer
from lockstep.net.pending import Inbox, PendingTransfer, as_bytes, sending
from lockstep.net.revocation_list import RevocationList, removed
from lockstep.net.sockets import (
    SILENCE_SECONDS,
    address_of,
    closed,
    end,
    handshake,
    listen,
    notice_silence,
    peer_errors,
    receive_message,
    send_message,
    wrap,
)
from lockstep.net.tls_stream import Deadline, TlsStream
from lockstep.net.transport import Heard, Key, Report, ignore
from lockstep.system.messages import Codec, ErrorMessage, Message

HANDSHAKE_SECONDS = 10.0
"""From a connection to its welcome."""
MAX_HANDSHAKES = 32
"""Connections that may be at that point at one time."""
RETRY_SECONDS = 0.05
GOODBYE_SECONDS = 1.0
ANSWERS: dict[Kind, Codec[Any]] = {Kind.WELCOME: HELLO, Kind.REFUSED: REFUSAL}
Address = tuple[str, int]


class TcpTransport:
    """A `Transport` whose peers are who their certificates say. Listens from the beginning.

    Who was removed from the cluster is refused from then on, and lost where it is connected.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        job: str,
        facts: Facts,
        codec: Codec[Message] | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        answer: bool = False,
        silence: float = SILENCE_SECONDS,
        report: Report = ignore,
        reports_ends: bool = True,
        roles: frozenset[Role] = EVERY_ROLE,
    ) -> None:
        """Listen, by default on loopback only and on a port that the kernel chooses.

        `codec` decodes the messages that peers may send; without it they may send tensors alone.

        With `answer`, this host connects back to each that connects to it, at the address that
        its hello names, or the one it comes from if that names none. A host that cannot be reached
        there within ten seconds is dropped. Who shall `connect` whom otherwise is for the hosts to
        know.

        A machine that has acknowledged nothing for `silence` seconds is lost. With
        `reports_ends` false, connections that merely end are not reported: that they have is told
        to those who wait for something. `roles`: what peers may be by their certificates.

        Raises:
            IdentityError: the identity cannot be used.
            OSError: nobody can listen there.
        """
        self.node = identity.node
        self._answers, self._report, self._silence = answer, report, silence
        self._reports_ends, self._roles = reports_ends, roles
        self._server = RenewedContext(identity, identity.server_context)
        self._client = RenewedContext(identity, identity.client_context)
        self._revoked = RevocationList(identity.folder)
        self._peers: dict[str, Peer] = {}
        self._lost: list[Peer] = []
        """Peers that another of the same name has taken the place of; to be reaped."""
        self._changed = threading.Condition()
        self._inbox = Inbox()
        self._closing = threading.Event()
        self._arrivals = Arrivals(MAX_HANDSHAKES)
        self._listener = listen(host, port)
        self.address: Address = address_of(self._listener)
        self._codec = codec
        self._hello = Hello(
            job=job, node=identity.node, facts=dict(facts),
            host=self.address[0], port=self.address[1],
        )  # fmt: skip
        self._accepting = threading.Thread(
            target=self._accept, name="lockstep-net accept", daemon=True
        )
        self._accepting.start()

    @property
    def peers(self) -> tuple[str, ...]:
        with self._changed:
            return tuple(sorted(peer.name for peer in self._peers.values() if peer.alive))

    def connect(self, addresses: Mapping[str, Address], timeout: float) -> None:
        """Open connections to these hosts, and wait until they have opened theirs to this one.

        Further hosts may be added by further calls.

        Raises:
            RefusedError: one of them is somebody else, or differs from this host in a fact.
            PeerTimeoutError: one cannot be reached, or has not connected, within so many seconds.
        """
        deadline = Deadline(timeout)
        problems: dict[str, str] = {}
        absent = sorted(addresses)
        while not self._closing.is_set():
            for name, address in addresses.items():
                try:
                    for stream in self._missing(name):
                        self._open(name, address, stream, deadline)
                except PeerClosedError as error:
                    problems[name] = f"{error.what}: {error.found}"
                except PeerTimeoutError as error:
                    problems.setdefault(name, error.what)  # what was wrong before says more
            with self._changed:
                absent = sorted(set(addresses) - set(self.peers))
                if not absent:
                    return
                if deadline.over:
                    break
                # Woken when a peer has connected; looks again soon where nobody listened yet.
                self._changed.wait(min(RETRY_SECONDS, deadline.rest))
        raise PeerTimeoutError(
            f"no connection with host {', '.join(absent)}",
            expected=f"connections in both directions within {timeout:g} s",
            found="; ".join(
                f"{name}: {problems.get(name, 'it has not connected to this host')}"
                for name in absent
            ),
            fix="see that each of them runs, and can be reached at the address that it has given",
        )

    def send(self, peer: str, key: Key, data: memoryview) -> PendingTransfer:
        body = as_bytes(data)
        transfer = sending(peer, key)
        start = head(key.kind, step=key.step, tag=key.tag, length=len(body))
        sender = self._peer(peer, transfer.what).sender(Stream.DATA, transfer.what)
        sender.send(Item(head=start, body=body, transfer=transfer))
        return transfer

    def expect(self, peer: str, key: Key, into: memoryview) -> PendingTransfer:
        return self._peer(peer, f"{key} from host {peer}").expected.expect(key, into)

    def tell(self, peer: str, message: Message) -> None:
        what = f"that host {peer} takes a message"
        sender = self._peer(peer, what).sender(Stream.CONTROL, what)
        sender.send(Item(head=message_frame(Kind.CONTROL, message)))

    def hear(self, timeout: float) -> Heard:
        if self._revoked.has_changed():
            try:
                self.lose_revoked()
            except IdentityError as error:  # whoever connects is refused until it can be read
                self._report(self.node, str(error))
        return self._inbox.get(timeout, lambda: " or ".join(self.peers) or "(none is connected)")

    def drop(self, peer: str, reason: str) -> None:
        with self._changed:
            found = self._peers.get(peer)
            if found is None or not (found.complete or found.error):
                return  # there is none, or it is just connecting anew
            del self._peers[peer]
        found.lose(closed(f"host {peer}", "nothing any more", f"dropped here: {reason}"))
        found.reap()

    def lose_revoked(self) -> None:
        """Lose the peers that were removed from the cluster; it is heard of as other losses are."""
        revoked = self._revoked.serials
        with self._changed:
            found = [peer for peer in self._peers.values() if peer.serials & revoked.keys()]
        for peer in found:
            peer.lose(removed(peer.name))

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        end(self._listener)
        with self._changed:
            peers = [*self._peers.values(), *self._lost]
            self._changed.notify_all()
        for peer in peers:
            for outgoing in list(peer.outgoing.values()):
                outgoing.finish(GOODBYE_SECONDS)
        served = self._arrivals.close()
        self._accepting.join()
        for thread in served:
            thread.join()
        self._listener.close()
        for peer in peers:
            peer.lose(closed(f"host {self.node}", "nothing any more", "it ended here"))
            peer.reap()

    # Connections that this host opens.

    def _missing(self, name: str) -> list[Stream]:
        """The streams for which this host has yet to open a connection."""
        with self._changed:
            found = self._peers.get(name)
            if found is None or found.error is not None:
                return list(Stream)
            return [stream for stream in Stream if stream not in found.outgoing]

    def _open(self, name: str, address: Address, stream: Stream, deadline: Deadline) -> None:
        limit = Deadline(min(deadline.rest, HANDSHAKE_SECONDS))
        who = f"host {name} at {address[0]}:{address[1]}"
        sock: socket.socket | None = None
        try:
            with peer_errors(who, "a welcome", limit.seconds):
                sock = socket.create_connection(address, limit.left())
                sock = secured = wrap(sock, self._client.current(), server=False)
                handshake(secured, limit)
                actual = peer_identity(secured)
                if actual.node != name:
                    raise RefusedError(f"{who} is another", expected=name, found=actual.node)
                self._check(actual)
                hello = self._hello.with_stream(stream.value)
                send_message(secured, Kind.HELLO, hello, limit)
                _, answer = receive_message(secured, ANSWERS, limit)
                if isinstance(answer, Refusal):
                    raise refusal(name, answer)
                check_hello(self._hello, answer, name)
                secured.deadline = None
                sock.settimeout(None)
                notice_silence(sock, self._silence)
                self._attach(actual, stream, sock)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, NetworkError) and not isinstance(error, PeerClosedError):
                self._report(name, str(error))
            raise

    def _check(self, peer: PeerIdentity) -> None:
        """Raise `RefusedError` if a certificate is not for a peer of this transport."""
        peer.check_role(self._roles)
        self._revoked.check(peer)

    def _attach(self, whose: PeerIdentity, stream: Stream, sock: socket.socket) -> None:
        name = whose.node
        with self._changed:
            peer = self._joining(whose)
            if stream in peer.outgoing:
                raise closed(f"host {name}", "a connection", "another thread has opened it")
            peer.outgoing[stream] = Outgoing(sock, name, peer.sending_failed)
            self._changed.notify_all()
        self._reap_lost()

    # Connections that other hosts open.

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    self._report("this host", f"a connection was not accepted: {error}")
                    self._closing.wait(RETRY_SECONDS)  # perhaps out of descriptors for a while
                continue
            at: Address = address[:2]
            who, serve = f"{at[0]}:{at[1]}", functools.partial(self._receive, sock, at)
            if why := self._arrivals.start(serve, sock, who, at[0]):
                sock.close()
                self._report(who, why)

    def _receive(self, sock: socket.socket, address: Address) -> None:
        """One accepted connection, from its handshake to its end."""
        who = f"{address[0]}:{address[1]}"
        try:
            limit = Deadline(HANDSHAKE_SECONDS)
            with peer_errors(who, "a certificate and a hello", limit.seconds):
                sock = secured = wrap(sock, self._server.current(), server=True)
                self._arrivals.secured(sock)
                handshake(secured, limit)
                whose = peer_identity(secured)
                who = whose.node
                peer, stream, hello = self._admit(secured, whose, limit)
        except Exception as error:  # such as no memory: others are received all the same
            sock.close()
            self._report(who, str(error) if isinstance(error, NetworkError) else repr(error))
            return
        finally:
            self._arrivals.done()
        self._reap_lost()
        if self._answers and stream is Stream.CONTROL:  # before a message of it is heard
            self._connect_back(peer, peer_address(hello, address[0]))
        peer.receive(stream)

    def _admit(
        self, sock: TlsStream, whose: PeerIdentity, limit: Deadline
    ) -> tuple[Peer, Stream, Hello]:
        """Welcome a connection, or tell the other side why not and raise.

        Returns whose it is, what it carries, and the hello of its host.
        """
        name = whose.node
        try:
            _, hello = receive_message(sock, {Kind.HELLO: HELLO}, limit)
            self._check(whose)
            check_hello(self._hello, hello, name)
            if not hello.stream:
                raise ProtocolError(f"host {name} does not say what its connection is for")
            stream = Stream(hello.stream)
            with self._changed:
                peer = self._current(name)
                if stream in peer.incoming:
                    raise PeerClosedError(f"host {name} is connected already")
            send_message(sock, Kind.WELCOME, self._hello, limit)
            sock.deadline = None
            notice_silence(sock, self._silence)
            with self._changed:
                if peer is not self._joining(whose) or stream in peer.incoming:
                    raise PeerClosedError(f"host {name} connects twice at once")
                target = peer.await_target if stream is Stream.DATA else None
                peer.incoming[stream] = Incoming(sock, name, stream, target)
                self._changed.notify_all()
        except NetworkError as error:
            again = isinstance(error, PeerClosedError)
            answer = Refusal(error=ErrorMessage.of(error), again=again)
            with contextlib.suppress(OSError):
                send_message(sock, Kind.REFUSED, answer, limit)
            raise
        return peer, stream, hello

    def _connect_back(self, peer: Peer, address: Address) -> None:
        """Connect to a host that has just connected to this one; lose it if that fails."""
        deadline = Deadline(HANDSHAKE_SECONDS)
        try:
            for stream in self._missing(peer.name):
                self._open(peer.name, address, stream, deadline)
        except NetworkError as error:
            peer.lose(error)

    # Peers, by name.

    def _current(self, name: str) -> Peer:
        """The peer of this name; a new one in the place of one that is lost. `_changed` is held."""
        self._check_open()
        found = self._peers.get(name)
        if found is None or found.error is not None:
            if found is not None:
                self._lost.append(found)
            found = self._peers[name] = Peer(name, self._inbox, self._codec, self._on_loss)
        return found

    def _joining(self, whose: PeerIdentity) -> Peer:
        """The peer that one more connection is of. `_changed` is held, and so whoever is removed
        meanwhile is either refused here or found by `lose_revoked`."""
        self._revoked.check(whose)
        peer = self._current(whose.node)
        peer.serials.add(whose.serial)
        return peer

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise closed(f"host {self.node}", "a connection", "it is closing")

    def _peer(self, name: str, what: str) -> Peer:
        with self._changed:
            found = self._peers.get(name)
        if found is None:
            raise closed(f"host {name}", what, "no connection")
        return found

    def _on_loss(self, peer: Peer, error: NetworkError) -> None:
        merely_ended = isinstance(error, PeerClosedError)
        in_order = merely_ended and (peer.has_left or not self._reports_ends)
        if not in_order and not self._closing.is_set():
            self._report(peer.name, str(error))
        with self._changed:
            self._changed.notify_all()

    def _reap_lost(self) -> None:
        with self._changed:
            lost, self._lost = self._lost, []
        for peer in lost:
            assert peer.error is not None
            peer.lose(peer.error)
            peer.reap()


def refusal(name: str, answer: Refusal) -> NetworkError:
    """The error that a peer's refusal describes; one to try again after if the peer says so."""
    kind, said = PeerClosedError if answer.again else RefusedError, answer.error.error()
    return kind(
        f"host {name} refused this host: {said.what}",
        expected=said.expected,
        found=said.found,
        fix=said.fix,
    )
