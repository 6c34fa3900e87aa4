"""Cargo: what a job's hosts fetch from its master over their own connections: code, and data.

The offer says how many bytes there are, and their digest. A host asks for pieces, a few ahead, so
that nothing piles up on either side, and so that the master's loop has nothing to do with it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from blake3 import blake3

from lockstep.errors import IntegrityError, NetworkError
from lockstep.net.control_link import ControlLink
from lockstep.net.frames import Kind
from lockstep.net.transport import Key, Pending, Transport, await_slip

PIECE_BYTES = 4 << 20
AHEAD = 8
"""Pieces that are asked for before the first of them has come."""
PIECE_SECONDS = 120.0
"""The longest that a piece may take after the one before."""
HOLDS = ("code", "data")
Hold = Literal["code", "data"]


@dataclass(frozen=True, kw_only=True)
class BlobInfo:
    """What there is to be fetched."""

    digest: str
    """BLAKE3, 64 hexadecimal digits."""
    nbytes: int

    @staticmethod
    def of(content: bytes | memoryview) -> BlobInfo:
        """The bill of these bytes."""
        return BlobInfo(digest=blake3(content).hexdigest(), nbytes=len(content))

    @staticmethod
    def from_message(message: Mapping[str, Any] | None) -> BlobInfo | None:
        """The bill in a message, if there is one. Raises TypeError, KeyError, ValueError."""
        if message is None:
            return None
        digest, nbytes = message["digest"], message["nbytes"]
        if type(nbytes) is not int or nbytes <= 0 or not is_digest(digest):
            raise ValueError("no digest of so many bytes")
        return BlobInfo(digest=digest, nbytes=nbytes)


def is_digest(text: object) -> bool:
    """Whether this is a digest as a bill has it."""
    return isinstance(text, str) and len(text) == 64 and not set(text) - set("0123456789abcdef")


class BlobServer:
    """The master's side. `serve` is called by the link's thread, whatever the master is at."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._held: dict[str, memoryview] = {}

    def put(self, hold: Hold, content: bytes | memoryview) -> None:
        """Have something to give. The memory must not change, nor go before the transport does."""
        self._held[hold] = memoryview(content).cast("B")

    def close(self) -> None:
        """Let go of what there was. Called when the transport is closed."""
        self._held.clear()

    def serve(self, peer: str, message: Mapping[str, Any]) -> None:
        """Send a piece to a host that asks for it; drop one that asks for what is not here."""
        hold, number = message.get("hold"), message.get("piece")
        content = self._held.get(hold, memoryview(b"")) if isinstance(hold, str) else b""
        if type(number) is not int or not 0 <= number * PIECE_BYTES < len(content):
            self._transport.drop(peer, f"it wants {ascii(message)[:200]}, which is not here")
            return
        piece = memoryview(content)[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]
        with contextlib.suppress(NetworkError):  # its loss is heard of
            self._transport.send(peer, _key(str(hold), number), piece)


def fetch(
    link: ControlLink,
    master: str,
    hold: Hold,
    blob: BlobInfo,
    into: memoryview,
    silent_seconds: float,
) -> None:
    """Fetch bytes from the master into memory of their number, and compare the digest.

    Raises:
        NetworkError: the master is lost, or has been silent for so many seconds.
        IntegrityError: they are not what the bill says.
    """
    pieces = [into[at : at + PIECE_BYTES] for at in range(0, blob.nbytes, PIECE_BYTES)]
    digest, asked = blake3(), deque[Pending]()
    for number, piece in enumerate(pieces):
        for ahead in range(number + len(asked), min(number + AHEAD, len(pieces))):
            key = _key(hold, ahead)
            asked.append(link.transport.expect(master, key, pieces[ahead]))
            link.transport.tell(master, {"op": "fetch", "hold": hold, "piece": ahead})
        await_slip(
            asked.popleft(),
            PIECE_SECONDS,
            lambda: link.silent_for(master) <= silent_seconds,
        )
        digest.update(piece)
    if digest.hexdigest() != blob.digest:
        raise IntegrityError(
            f"the {hold} that host {master} has sent is not what was offered",
            expected=f"digest {blob.digest[:16]}…",
            found=f"digest {digest.hexdigest()[:16]}…",
            fix="run the job again; if it happens again, look at who is between the two hosts",
        )


def _key(hold: str, number: int) -> Key:
    return Key(Kind.CARGO, HOLDS.index(hold), number)
