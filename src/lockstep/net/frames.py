"""Frames: what goes over a connection between hosts. Bytes in, frames out; no I/O here.

A frame is a header and a body. Integers are unsigned and big-endian:

    bytes  4      1        1     2      8     4    8       = 28
           magic  version  kind  flags  step  tag  length    then `length` bytes of body

What a kind may hold is bounded, and checked before memory is taken for it. The body of a tensor
goes straight into memory that its receiver has set aside; a peer's word allocates none. All other
bodies are messages (see `system.messages`).
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from lockstep.errors import ProtocolError
from lockstep.system.messages import Message, encode

MAGIC = b"LKST"
VERSION = 2
"""Of the frames and of all messages."""
HEADER = struct.Struct(">4sBBHQIQ")


class Kind(enum.IntEnum):
    """What a frame is."""

    HELLO = 1
    WELCOME = 2
    REFUSED = 3
    GOODBYE = 4
    CONTROL = 5
    AUTHORITY = 6
    ENROL = 7
    ENROLLED = 8
    PARTIAL = 16
    REDUCED = 17
    STATE = 18
    BLOB = 19
    SHOWN = 20


TENSORS = frozenset({Kind.PARTIAL, Kind.REDUCED, Kind.STATE, Kind.BLOB, Kind.SHOWN})
"""Kinds whose body is raw bytes for memory that the receiver knows."""

LIMITS: Mapping[Kind, int] = {
    Kind.HELLO: 64 << 10,
    Kind.WELCOME: 64 << 10,
    Kind.REFUSED: 64 << 10,
    Kind.GOODBYE: 0,
    Kind.CONTROL: 1 << 20,
    Kind.AUTHORITY: 16 << 10,
    Kind.ENROL: 16 << 10,
    Kind.ENROLLED: 64 << 10,
    Kind.PARTIAL: 1 << 30,
    Kind.REDUCED: 1 << 30,
    Kind.STATE: 1 << 30,
    Kind.BLOB: 4 << 20,
    Kind.SHOWN: 1 << 30,
}
"""Bytes: the longest body of each kind."""
MAX_STEP, MAX_TAG = 2**64 - 1, 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A header whose fields are within their bounds. `step` and `tag` are 0 but for tensors."""

    kind: Kind
    step: int = 0
    tag: int = 0
    length: int = 0
    """Bytes of the body."""

    def __str__(self) -> str:
        if self.kind in TENSORS:
            return describe(self.kind, self.step, self.tag)
        return f"a message {self.kind.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A frame that is complete. A tensor's body is the memory that was set aside for it."""

    header: Header
    body: memoryview


Target = Callable[[Header], memoryview]
"""Returns the memory for the body of a tensor: exactly `length` writable bytes. May raise."""


def describe(kind: Kind, step: int, tag: int) -> str:
    """A tensor in words."""
    return f"{kind.name.lower()} {tag} of step {step}"


def head(kind: Kind, *, step: int = 0, tag: int = 0, length: int = 0) -> bytes:
    """A header's bytes.

    Raises:
        ProtocolError: a field is out of its bounds; nothing may be sent then.
    """
    if not 0 <= length <= LIMITS[kind]:
        _broken(f"{kind.name} has a body of {length:,} bytes", f"at most {LIMITS[kind]:,}")
    if not (0 <= step <= MAX_STEP and 0 <= tag <= MAX_TAG):
        _broken(f"step {step}, tag {tag}", f"at most {MAX_STEP} and {MAX_TAG}")
    return HEADER.pack(MAGIC, VERSION, kind, 0, step, tag, length)


def parse_head(data: bytes | bytearray, kinds: Collection[Kind] = tuple(Kind)) -> Header:
    """The header in these 28 bytes, if it is one of `kinds`.

    Raises:
        ProtocolError: it breaks a rule; says which.
    """
    magic, version, number, flags, step, tag, length = HEADER.unpack(data)
    if magic != MAGIC:
        _broken(f"a frame begins with {magic!r}", f"{MAGIC!r}")
    if version != VERSION:
        _broken(f"version {version} of the protocol", f"version {VERSION}")
    if number not in kinds:
        _broken(f"a frame of kind {number}", ", ".join(kind.name for kind in kinds))
    kind = Kind(number)
    if flags:
        _broken(f"flags {flags:#x}", "none in this version")
    if kind not in TENSORS and (step or tag):
        _broken(f"{kind.name} with step {step} and tag {tag}", "0 for both")
    if length > LIMITS[kind]:
        _broken(f"{kind.name} with a body of {length:,} bytes", f"at most {LIMITS[kind]:,}")
    return Header(kind=kind, step=step, tag=tag, length=length)


def message_frame(kind: Kind, message: Message | None = None) -> bytes:
    """A whole frame with a message in it, or without a body.

    Raises:
        ProtocolError: it is too long, or cannot be sent.
    """
    body = b"" if message is None else encode(message)
    return head(kind, length=len(body)) + body


class Reader:
    """Cuts a stream into frames: tells where the next bytes belong, and what they completed.

    The caller writes bytes into `room()` and says how many with `took`. That never asks for more
    than the rest of a header or of a body, so nothing is read that belongs to somebody else.
    After an error the stream cannot be read on.
    """

    def __init__(self, kinds: Collection[Kind] = tuple(Kind), target: Target | None = None) -> None:
        self._kinds, self._target_of = kinds, target
        self._head = bytearray(HEADER.size)
        self._header: Header | None = None
        self._target = memoryview(self._head)
        self._have = 0

    @property
    def between(self) -> bool:
        """Whether the stream may end here: no byte of the next frame has come."""
        return self._header is None and not self._have

    def room(self) -> memoryview:
        """Where the next bytes of the stream belong; at least one."""
        return self._target[self._have :]

    def took(self, count: int) -> Frame | None:
        """Count bytes that were written into `room()`; returns a frame if it is complete now.

        Raises:
            ProtocolError: they break a rule.
        """
        self._have += count
        if self._have < len(self._target):
            return None
        if self._header is None:
            header = parse_head(self._head, self._kinds)
            self._header = header  # before a place is asked for: it may take a while to come
            self._target, self._have = self._memory(header), 0
            if header.length:
                return None
        frame = Frame(header=self._header, body=self._target)
        self._header, self._target, self._have = None, memoryview(self._head), 0
        return frame

    def feed(self, data: bytes | memoryview) -> Iterator[Frame]:
        """The frames that these bytes complete. Copies them; `room` and `took` need not.

        Raises:
            ProtocolError: they break a rule.
        """
        view = memoryview(data)
        while view:
            room = self.room()
            count = min(len(room), len(view))
            room[:count] = view[:count]
            view = view[count:]
            frame = self.took(count)
            if frame is not None:
                yield frame

    def describe(self) -> str:
        """How far it is, in words."""
        header = self._header
        if header is not None:
            come = 0 if self._target.obj is self._head else self._have
            return f"{come:,} of {header.length:,} bytes of {header}"
        return f"{self._have} of {HEADER.size} bytes of a header" if self._have else "no frame"

    def _memory(self, header: Header) -> memoryview:
        if header.kind not in TENSORS:
            return memoryview(bytearray(header.length))
        if self._target_of is None:
            _broken(str(header), "no tensor on this connection")
        memory = self._target_of(header)
        if len(memory) != header.length:
            _broken(f"{header.length:,} bytes for {header}", f"{len(memory):,}")
        return memory


def _broken(found: str, expected: str) -> NoReturn:
    raise ProtocolError("a frame breaks the protocol", expected=expected, found=found)
