"""Joining: a newcomer shows a secret and gets a certificate. Its private key never leaves it.

    newcomer                                   host that enrols
    TLS, nothing verified, nothing said   <->  its CA's certificate: is it the invitation's?
    TLS again, to a host of that CA only  <->  its CA's certificate
    the secret, a certificate request      ->  uses the token up, signs
                                          <-   the certificate, and a greeting

An invitation is a token, or what a rank makes of a secret that all hosts share (see `shared`).
All other connections are mutual TLS. Who cannot show a token learns the CA's certificate and
nothing else. What a newcomer may send is bounded, and so are its time, how many are served at
once, and how often an address may try.
"""

from __future__ import annotations

import base64
import binascii
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lockstep.errors import (
    IdentityError,
    LockstepError,
    ProtocolError,
    RefusedError,
    to_message,
)
from lockstep.net.certificates import fingerprint, one_certificate
from lockstep.net.frames import Kind, Message
from lockstep.net.identity import Identity, newcomer_context, peer_name
from lockstep.net.join_tokens import Token, TokenBook
from lockstep.net.sockets import (
    Deadline,
    address_of,
    closed,
    details,
    end,
    handshake,
    listen,
    peer_errors,
    plain,
    receive_message,
    send_message,
    wrap,
)
from lockstep.net.transport import Report, ignore

SERVE_SECONDS = 10.0
"""How long one newcomer is served."""
MAX_SERVED = 16
"""Newcomers at one time. Others wait for the slowest of them, in the kernel's queue."""
TOKEN_SECONDS = 900.0
Sign = Callable[[bytes], bytes]
"""A certificate for a request, both in PEM, as `Authority.sign`."""


class Invitation(Protocol):
    """What a newcomer needs: where to go, how to know that it is right there, what to show."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...

    @property
    def node(self) -> str:
        """The name of the host that answers there."""

    @property
    def secret(self) -> bytes:
        """Lets one host in, once."""

    def vouch(self, authority: str, proof: str) -> None:
        """Check that a CA (PEM) is the cluster's, perhaps by the proof that was sent with it.

        Raises:
            RefusedError: it is not.
        """


class Limiter:
    """How often each address may try: `burst` at once, then one more every `seconds`.

    Pure: times are given, in seconds. Remembers a bounded number of addresses.
    """

    def __init__(self, *, burst: int = 20, seconds: float = 1.0, addresses: int = 1024) -> None:
        self._burst, self._seconds, self._addresses = burst, seconds, addresses
        self._free_at: OrderedDict[str, float] = OrderedDict()
        """When each address has its whole burst again."""

    def admits(self, address: str, now: float) -> bool:
        """Whether this attempt is within the limit; counts it if so."""
        free_at = max(now, self._free_at.pop(address, now))
        admitted = free_at - now <= (self._burst - 1) * self._seconds
        self._free_at[address] = free_at + self._seconds if admitted else free_at
        if len(self._free_at) > self._addresses:
            self._free_at.popitem(last=False)
        return admitted


class JoinServer:
    """Enrols newcomers until it is closed. Made by the host that holds the CA."""

    def __init__(
        self,
        identity: Identity,
        sign: Sign,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        greeting: Mapping[str, Any] | None = None,
        proof: str = "",
        limiter: Limiter | None = None,
        report: Report = ignore,
        serve_seconds: float = SERVE_SECONDS,
    ) -> None:
        """Listen, by default on loopback only.

        `greeting` is what a new host is told besides. `proof` goes to everybody with the CA's
        certificate, for those who have no fingerprint of it.
        """
        self._identity, self._sign, self._report = identity, sign, report
        self._greeting, self._limiter = dict(greeting or {}), limiter or Limiter()
        self._serve_seconds = serve_seconds
        self._context = identity.open_context()
        self._authority = (identity.folder / "authority.pem").read_text()
        self._shown = {"authority": self._authority, "proof": proof}
        self._book = TokenBook()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._served: dict[threading.Thread, socket.socket] = {}
        self._places = threading.BoundedSemaphore(MAX_SERVED)
        self._listener = listen(host, port)
        self.address = address_of(self._listener)
        self._accepting = threading.Thread(
            target=self._accept, name="lockstep-net join", daemon=True
        )
        self._accepting.start()

    def token(self, *, seconds: float = TOKEN_SECONDS, host: str | None = None) -> Token:
        """A new token for one host. `host` is the address to be used from outside, if another."""
        return self._book.issue(
            host=host or self.address[0],
            port=self.address[1],
            node=self._identity.node,
            fingerprint=fingerprint(self._authority),
            seconds=seconds,
            now=time.time(),
        )

    def admit(self, secret: bytes, *, seconds: float) -> None:
        """Let one host in that shows this secret, which it has from elsewhere."""
        self._book.admit(secret, seconds=seconds, now=time.time())

    def close(self) -> None:
        """Refuse everybody from now on. Leaves no thread and no descriptor."""
        self._closing.set()
        end(self._listener)
        self._end_served()
        self._accepting.join()
        for thread in self._end_served():
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            self._places.acquire()
            try:
                sock, address = self._listener.accept()
            except OSError:
                self._places.release()
                self._closing.wait(0.05)  # perhaps out of descriptors for a while
                continue
            if not self._limiter.admits(address[0], time.monotonic()):
                sock.close()
                self._places.release()
                self._report(address[0], "it tries to join too often")
                continue
            who = f"{address[0]}:{address[1]}"
            thread = threading.Thread(
                target=self._serve, args=(sock, who), name=f"lockstep-net join {who}", daemon=True
            )
            with self._lock:
                self._served[thread] = sock
            thread.start()

    def _serve(self, sock: socket.socket, who: str) -> None:
        """One newcomer, whatever it does. The report never holds what it has sent."""
        thread = threading.current_thread()
        try:
            limit = Deadline(self._serve_seconds)
            with peer_errors(who, "a token and a certificate request", limit.seconds):
                sock = secured = wrap(sock, self._context, server=True)
                with self._lock:
                    if self._closing.is_set():
                        raise closed("this host", "a newcomer", "it is closing")
                    self._served[thread] = sock
                handshake(secured, limit)
                send_message(sock, Kind.AUTHORITY, self._shown, limit)
                kind, message = receive_message(sock, (Kind.ENROL, Kind.GOODBYE), limit)
                if kind is Kind.GOODBYE:
                    return  # it only wanted to see the CA's certificate
                self._answer(sock, message, limit)
            self._report(who, "it has joined")
        except LockstepError as error:
            self._report(who, str(error))
        finally:
            sock.close()
            with self._lock:
                del self._served[thread]
            self._places.release()

    def _answer(self, sock: socket.socket, message: Message, limit: Deadline) -> None:
        try:
            secret, request = parse_enrolment(message)
            self._book.redeem(secret, time.time())  # first: nothing else is read of strangers
            certificate = self._sign(request).decode()
        except LockstepError as error:
            send_message(sock, Kind.REFUSED, to_message(error), limit)
            raise
        send_message(
            sock, Kind.ENROLLED, {"certificate": certificate, "greeting": self._greeting}, limit
        )

    def _end_served(self) -> list[threading.Thread]:
        with self._lock:
            for sock in self._served.values():
                end(sock)
            return list(self._served)


def parse_enrolment(message: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The secret and the certificate request in a newcomer's message.

    Raises:
        ProtocolError: they are not in it. Says nothing of what is.
    """
    secret, request = message.get("secret"), message.get("request")
    if isinstance(secret, str) and isinstance(request, str):
        try:
            return base64.b64decode(secret, validate=True), request.encode()
        except (ValueError, binascii.Error):
            pass
    raise ProtocolError(
        "a newcomer's message breaks the protocol", expected="a secret and a certificate request"
    )


def join(
    invitation: Invitation, folder: Path, name: str, *, timeout: float
) -> tuple[Identity, Message]:
    """Become a host of the cluster, with this name; returns the server's greeting, too.

    The identity is written to `folder`, where there must be none.

    Raises:
        RefusedError: the secret or the name was refused, or another cluster answers.
        IdentityError: the name or the folder cannot be used.
        PeerClosedError, PeerTimeoutError, ProtocolError: by the network. If the secret was sent
            before that, it is used up.
    """
    from lockstep.net import certificate_authority as authority

    limit = Deadline(timeout)
    request = authority.make_request(folder, name)
    who = f"host {invitation.node} at {invitation.host}:{invitation.port}"
    with peer_errors(who, "a certificate", timeout):
        shown, _ = _ask(invitation, None, None, limit)
        ca = one_certificate(str(shown.get("authority", "")))
        invitation.vouch(ca, str(shown.get("proof", "")))
        secret = base64.b64encode(invitation.secret).decode()
        said = {"secret": secret, "request": request.decode()}
        _, answer = _ask(invitation, ca, said, limit)
    certificate, greeting = answer.get("certificate"), answer.get("greeting")
    if not isinstance(certificate, str) or not isinstance(greeting, dict):
        raise ProtocolError("the answer of " + who, expected="a certificate and a greeting")
    authority.store(folder, certificate.encode(), ca)
    identity = Identity.load(folder)
    if identity.node != name:
        raise IdentityError("the new certificate is another's", expected=name, found=identity.node)
    return identity, greeting


def _ask(
    invitation: Invitation, authority: str | None, said: Message | None, limit: Deadline
) -> tuple[Message, Message]:
    """What the server shows everybody, and its answer to what is said, if anything."""
    sock = socket.create_connection((invitation.host, invitation.port), limit.left())
    try:
        sock = secured = wrap(sock, newcomer_context(authority), server=False)
        handshake(secured, limit)
        _, shown = receive_message(sock, (Kind.AUTHORITY,), limit)
        if said is None:
            send_message(sock, Kind.GOODBYE, {}, limit)
            return shown, {}
        if (actual := peer_name(secured)) != invitation.node:
            raise RefusedError("another host answers", expected=invitation.node, found=actual)
        send_message(sock, Kind.ENROL, said, limit)
        kind, answer = receive_message(sock, (Kind.ENROLLED, Kind.REFUSED), limit)
    finally:
        sock.close()
    if kind is Kind.REFUSED:
        raise RefusedError(plain(answer.get("what")), **details(answer))
    return shown, answer
