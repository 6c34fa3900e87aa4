"""The contract of a transport between the agents of a job: one agent per host, each with a name.

Tensors go by key: the receiver says beforehand into which memory the bytes of a key belong, and
they are written there. Messages are small structs (see `system.messages`); what a host understands
is said when its transport is made, and whoever sends anything else is lost with a `ProtocolError`,
before anybody has looked at it. Both go on at once, in all directions.

What every transport promises, and `tests/net/test_transport_contract.py` checks for each:

- What arrives is whole, and what one peer sends arrives in the order in which it was sent.
- `send` and `expect` return at once. Between two hosts that both expect what they are sent,
  before they wait for anything, no order of sends, expectations and waits is a deadlock.
- Every wait has a limit and ends in one of three errors, which name the peer and what was waited
  for: `PeerClosedError` (it closed the connection, or died), `PeerTimeoutError` (it is silent, or
  too slow), `ProtocolError` (it sent what was not agreed; the connection is closed).
- The loss of a peer fails everything that is under way with it, and nothing that is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from lockstep.errors import NetworkError, PeerTimeoutError
from lockstep.net.frames import Kind, describe
from lockstep.system.messages import Message

Report = Callable[[str, str], None]
"""Told of every connection that is refused, or lost without a goodbye: who (a host's name, or an
address) and why. Called from several threads."""


def ignore(who: str, why: str) -> None:
    """A `Report` for those who have no log."""


class Key(NamedTuple):
    """Names a tensor between two hosts. May be used again once it has been received."""

    kind: Kind
    step: int
    tag: int = 0
    """Which bucket, at most 32 bits; the agents say what it means."""

    def __str__(self) -> str:
        return describe(*self)


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A peer's message, or that the peer is lost."""

    peer: str
    message: Message | None = None
    error: NetworkError | None = None
    nbytes: int = 0
    """Of the message, as it came."""


class Pending(Protocol):
    """A send or a receipt that is under way."""

    peer: str
    what: str
    """In words."""

    @property
    def ended(self) -> bool:
        """Whether it is complete or has failed."""

    def done(self) -> bool:
        """Whether it is complete. False if it failed."""

    def wait(self, timeout: float) -> None:
        """Return when it is complete: received bytes are all in place, sent memory may change.

        Raises:
            PeerClosedError, ProtocolError: it failed and never will be.
            PeerTimeoutError: it is not complete within `timeout` seconds. The memory is still in
                use until the peer is dropped.
        """


LOOK_SECONDS = 0.1
"""Between two looks at whether something under way is still wanted."""


def await_transfer(transfer: Pending, seconds: float, wanted: Callable[[], bool]) -> None:
    """Wait for something under way, for so many seconds, as long as it is wanted. Raises as
    `Pending.wait` does."""
    limit = time.monotonic() + seconds
    while not transfer.done():
        try:
            transfer.wait(LOOK_SECONDS)
        except PeerTimeoutError:
            if transfer.ended or not wanted() or time.monotonic() > limit:
                raise


class Transport(Protocol):
    """One host's side. Its methods may be called from any thread."""

    node: str
    """This host's name."""

    @property
    def peers(self) -> tuple[str, ...]:
        """The names of the hosts that can be reached now, sorted."""

    def send(self, peer: str, key: Key, data: memoryview) -> Pending:
        """Send bytes, which must not change until that is complete. Raises the loss of `peer`."""

    def expect(self, peer: str, key: Key, into: memoryview) -> Pending:
        """Receive what `peer` sends under `key` into this memory: contiguous, of just that size.

        What nobody expects yet is left on the way, and so is what the peer sent after it.
        Raises the loss of `peer`; a `NetworkError` if the key is expected already.
        """

    def tell(self, peer: str, message: Message) -> None:
        """Send a message, of at most 1 MiB. Raises the loss of `peer`.

        It overtakes tensors. Nobody confirms it.
        """

    def hear(self, timeout: float) -> Heard:
        """The next message from anybody. The loss of a peer is heard once, after its last message.

        Raises:
            PeerTimeoutError: nobody said anything within `timeout` seconds.
        """

    def drop(self, peer: str, reason: str) -> None:
        """Close what connects to `peer`. Afterwards none of its bytes are written anywhere."""

    def close(self) -> None:
        """Say goodbye and drop every peer. Leaves no thread and no descriptor."""
