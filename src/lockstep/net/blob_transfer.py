"""Blob transfer: code and data that a job's hosts fetch from its master, over their connections.

The offer says how many bytes there are, and their digest. A host asks for pieces, a few ahead, so
that nothing piles up on either side, and so that the master's loop has nothing to do with it.
"""

from __future__ import annotations

import contextlib
import re
from collections import deque
from collections.abc import Callable
from typing import Annotated

import msgspec
from blake3 import blake3

from lockstep.errors import IntegrityError, NetworkError
from lockstep.net.control_link import BlobName, ControlLink, FetchPiece
from lockstep.net.frames import Kind
from lockstep.net.transport import Key, Pending, Transport, await_transfer
from lockstep.system.messages import Digest, Message

PIECE_BYTES = 4 << 20
AHEAD = 8
"""Pieces that are asked for before the first of them has come."""
PIECE_SECONDS = 120.0
"""The longest that a piece may take after the one before."""
NAMES: tuple[BlobName, ...] = ("code", "data")
MAX_BLOB_BYTES = 1 << 44


class BlobInfo(Message):
    """What there is to be fetched."""

    digest: Digest
    nbytes: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOB_BYTES)]

    @staticmethod
    def of(content: bytes | memoryview) -> BlobInfo:
        """What describes these bytes."""
        return BlobInfo(digest=blake3(content).hexdigest(), nbytes=len(content))


def is_digest(text: object) -> bool:
    """Whether this is a digest as `BlobInfo` has it."""
    return isinstance(text, str) and re.fullmatch(r"[0-9a-f]{64}", text) is not None


class BlobServer:
    """The master's side. `serve` is called by the link's thread, whatever the master is at."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._blobs: dict[BlobName, memoryview] = {}

    def put(self, name: BlobName, content: bytes | memoryview) -> None:
        """Have something to give. The memory must not change, nor go before the transport does."""
        self._blobs[name] = memoryview(content).cast("B")

    def close(self) -> None:
        """Let go of what there was. Called when the transport is closed."""
        self._blobs.clear()

    def serve(self, peer: str, wanted: FetchPiece) -> None:
        """Send a piece to a host that asks for it; drop one that asks for what is not here."""
        content, start = self._blobs.get(wanted.blob, memoryview(b"")), wanted.piece * PIECE_BYTES
        if start >= len(content):
            why = f"it wants piece {wanted.piece} of the {wanted.blob}, which is not here"
            self._transport.drop(peer, why)
            return
        with contextlib.suppress(NetworkError):  # its loss is heard of
            piece = content[start : start + PIECE_BYTES]
            self._transport.send(peer, _key(wanted.blob, wanted.piece), piece)


def fetch(
    link: ControlLink,
    master: str,
    name: BlobName,
    blob: BlobInfo,
    into: memoryview,
    silent_seconds: float,
    reserve: Callable[[int, int], None] = lambda start, nbytes: None,
) -> None:
    """Fetch bytes from the master into memory of their number, and compare the digest. `reserve`
    is called with the place and the size of each piece before it is asked for.

    Raises:
        NetworkError: the master is lost, or has been silent for so many seconds.
        IntegrityError: they are not what was offered.
    """
    pieces = [into[at : at + PIECE_BYTES] for at in range(0, blob.nbytes, PIECE_BYTES)]
    digest, asked = blake3(), deque[Pending]()
    for number, piece in enumerate(pieces):
        for ahead in range(number + len(asked), min(number + AHEAD, len(pieces))):
            key = _key(name, ahead)
            reserve(ahead * PIECE_BYTES, len(pieces[ahead]))
            asked.append(link.transport.expect(master, key, pieces[ahead]))
            link.transport.tell(master, FetchPiece(blob=name, piece=ahead))
        await_transfer(
            asked.popleft(),
            PIECE_SECONDS,
            lambda: link.silent_for(master) <= silent_seconds,
        )
        digest.update(piece)
    if digest.hexdigest() != blob.digest:
        raise IntegrityError(
            f"the {name} that host {master} has sent is not what was offered",
            expected=f"digest {blob.digest[:16]}…",
            found=f"digest {digest.hexdigest()[:16]}…",
            fix="run the job again; if it happens again, look at who is between the two hosts",
        )


def _key(name: BlobName, number: int) -> Key:
    return Key(Kind.BLOB, NAMES.index(name), number)
