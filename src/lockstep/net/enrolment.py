"""Enrolment: a newcomer shows a secret and gets a certificate. Its private key never leaves it.

    newcomer                                   host that enrols
    TLS, nothing verified, nothing said   <->  its CA's certificate: is it the invitation's?
    TLS again, to a head of that CA only  <->  its CA's certificate
    the secret, a certificate request      ->  uses the token up, signs
                                          <-   the certificate, and a greeting

An invitation is a token, or what a rank makes of a secret that all hosts share, as `shared_secret`
has it. All other connections are mutual TLS. Who cannot show a token learns the CA's certificate
and nothing else. What a newcomer may send is bounded, and so are its time, how many are served at
once, and how often an address may try.
"""

from __future__ import annotations

import functools
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import msgspec

from lockstep.errors import IdentityError, LockstepError, RefusedError
from lockstep.net.arrivals import Arrivals
from lockstep.net.certificates import Role, fingerprint, one_certificate
from lockstep.net.frames import Kind
from lockstep.net.handshake import REFUSAL, Refusal
from lockstep.net.identity import Identity, RenewedContext, newcomer_context, peer_identity
from lockstep.net.join_tokens import Token, TokenBook
from lockstep.net.sockets import (
    address_of,
    end,
    handshake,
    listen,
    peer_errors,
    receive_message,
    send_message,
    wrap,
)
from lockstep.net.tls_stream import Deadline, TlsStream
from lockstep.net.transport import Report, ignore
from lockstep.system.messages import Codec, ErrorMessage, Message

SERVE_SECONDS = 10.0
"""How long one newcomer is served."""
MAX_SERVED = 16
"""Newcomers at one time."""
TOKEN_SECONDS = 900.0
Sign = Callable[[bytes], bytes]
"""A certificate for a request, both in PEM, as `Authority.sign`."""

Pem = Annotated[str, msgspec.Meta(max_length=16 << 10)]


class AuthorityShown(Message):
    """The CA's certificate, for everybody; `proof` is for those who have no fingerprint of it."""

    authority: Pem
    proof: Annotated[str, msgspec.Meta(max_length=256)] = ""


class EnrolmentRequest(Message):
    """What a newcomer shows, and the certificate that it wants, in PEM."""

    secret: Annotated[bytes, msgspec.Meta(max_length=256)]
    request: Annotated[bytes, msgspec.Meta(max_length=8 << 10)]


class Enrolled(Message):
    """The certificate, in PEM, and what else the newcomer is told."""

    certificate: Pem
    greeting: Annotated[bytes, msgspec.Meta(max_length=40 << 10)]
    """A message of the conversation that the newcomer is to take part in, encoded."""


SHOWN: Codec[AuthorityShown] = Codec(AuthorityShown)
REQUEST: Codec[EnrolmentRequest] = Codec(
    EnrolmentRequest, "a newcomer's message breaks the protocol"
)
ENROLLED: Codec[Enrolled] = Codec(Enrolled)
ASKED: dict[Kind, Codec[EnrolmentRequest] | None] = {Kind.ENROL: REQUEST, Kind.GOODBYE: None}
ANSWERS: dict[Kind, Codec[Any]] = {Kind.ENROLLED: ENROLLED, Kind.REFUSED: REFUSAL}


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
        greeting: bytes = b"",
        proof: str = "",
        limiter: Limiter | None = None,
        report: Report = ignore,
        serve_seconds: float = SERVE_SECONDS,
    ) -> None:
        """Listen, by default on loopback only.

        `greeting` is what a new host is told besides: a message, encoded. `proof` goes to
        everybody with the CA's certificate, for those who have no fingerprint of it.
        """
        self._identity, self._sign, self._report = identity, sign, report
        self._greeting, self._limiter = greeting, limiter or Limiter()
        self._serve_seconds = serve_seconds
        self._context = RenewedContext(identity, identity.open_context)
        self._authority = (identity.folder / "authority.pem").read_text()
        self._shown = AuthorityShown(authority=self._authority, proof=proof)
        self._book = TokenBook()
        self._closing = threading.Event()
        self._arrivals = Arrivals(MAX_SERVED)
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
        served = self._arrivals.close()
        self._accepting.join()
        for thread in served:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError as error:
                if not self._closing.is_set():
                    self._report("this host", f"a connection was not accepted: {error}")
                    self._closing.wait(0.05)  # perhaps out of descriptors for a while
                continue
            who, why = f"{address[0]}:{address[1]}", "it tries to join too often"
            if self._limiter.admits(address[0], time.monotonic()):
                serve = functools.partial(self._serve, sock, who)
                why = self._arrivals.start(serve, sock, who, address[0])
            if why:
                sock.close()
                self._report(address[0], why)

    def _serve(self, sock: socket.socket, who: str) -> None:
        """One newcomer, whatever it does. The report never holds what it has sent."""
        try:
            limit = Deadline(self._serve_seconds)
            with peer_errors(who, "a token and a certificate request", limit.seconds):
                sock = secured = wrap(sock, self._context.current(), server=True)
                self._arrivals.secured(sock)
                handshake(secured, limit)
                send_message(secured, Kind.AUTHORITY, self._shown, limit)
                joined = self._answer(secured, limit)
            if joined:  # else it only wanted to see the CA's certificate
                self._report(who, "it has joined")
        except LockstepError as error:
            self._report(who, str(error))
        except Exception as error:  # such as no memory: others are served all the same
            self._report(who, f"it cannot be served: {type(error).__name__}")
        finally:
            sock.close()
            self._arrivals.done()

    def _answer(self, sock: TlsStream, limit: Deadline) -> bool:
        """Give a newcomer its certificate; False: it wants none."""
        try:
            kind, wanted = receive_message(sock, ASKED, limit)
            if kind is Kind.GOODBYE:
                return False
            self._book.redeem(wanted.secret, time.time())  # first: nothing else is read before
            certificate = self._sign(wanted.request).decode()
        except LockstepError as error:
            send_message(sock, Kind.REFUSED, Refusal(error=ErrorMessage.of(error)), limit)
            raise
        answer = Enrolled(certificate=certificate, greeting=self._greeting)
        send_message(sock, Kind.ENROLLED, answer, limit)
        return True


def join(
    invitation: Invitation, folder: Path, name: str, *, timeout: float, again: bool = False
) -> tuple[Identity, bytes]:
    """Become a host of the cluster, with this name; returns the server's greeting, too.

    The identity is written to `folder`, where there must be none. With `again` there is one of
    that cluster, whose certificate cannot be used any more: it gets another one.

    Raises:
        RefusedError: the secret or the name was refused, or another cluster answers.
        IdentityError: the name or the folder cannot be used.
        PeerClosedError, PeerTimeoutError, ProtocolError: by the network. If the secret was sent
            before that, it is used up.
    """
    from lockstep.net import certificate_authority as authority

    limit = Deadline(timeout)
    request = authority.renewal_request(folder) if again else authority.make_request(folder, name)
    who = f"host {invitation.node} at {invitation.host}:{invitation.port}"
    with peer_errors(who, "a certificate", timeout):
        shown = _look(invitation, limit)
        ca = one_certificate(shown.authority)
        invitation.vouch(ca, shown.proof)
        wanted = EnrolmentRequest(secret=invitation.secret, request=request)
        answer = _ask(invitation, ca, wanted, limit)
    if again:
        authority.renew(folder, answer.certificate.encode())
    else:
        authority.store(folder, answer.certificate.encode(), ca)
    identity = Identity.load(folder)
    if identity.node != name and not again:
        raise IdentityError("the new certificate is another's", expected=name, found=identity.node)
    return identity, answer.greeting


def _look(invitation: Invitation, limit: Deadline) -> AuthorityShown:
    """What the server shows everybody."""
    with _connected(invitation, None, limit) as sock:
        _, shown = receive_message(sock, {Kind.AUTHORITY: SHOWN}, limit)
        send_message(sock, Kind.GOODBYE, None, limit)
    checked: AuthorityShown = shown
    return checked


def _ask(
    invitation: Invitation, authority: str, wanted: EnrolmentRequest, limit: Deadline
) -> Enrolled:
    """The server's answer, if a certificate of this CA says that it is the one."""
    with _connected(invitation, authority, limit) as sock:
        receive_message(sock, {Kind.AUTHORITY: SHOWN}, limit)
        actual = peer_identity(sock)
        if actual.node != invitation.node:
            raise RefusedError("another host answers", expected=invitation.node, found=actual.node)
        actual.check_role(frozenset({Role.HEAD}))
        send_message(sock, Kind.ENROL, wanted, limit)
        _, answer = receive_message(sock, ANSWERS, limit)
    if isinstance(answer, Refusal):
        said = answer.error.error()
        raise RefusedError(said.what, expected=said.expected, found=said.found, fix=said.fix)
    checked: Enrolled = answer
    return checked


def _connected(invitation: Invitation, authority: str | None, limit: Deadline) -> TlsStream:
    """A connection to the server. `authority`: the CA that its certificate is to be of."""
    sock = socket.create_connection((invitation.host, invitation.port), limit.left())
    try:
        sock = secured = wrap(sock, newcomer_context(authority), server=False)
        handshake(secured, limit)
    except BaseException:
        sock.close()
        raise
    return secured
