"""Typed messages: frozen structs, encoded as MessagePack and decoded strictly.

The one mechanism for every channel: between processes of a host (`unix_channel`), between hosts
(`net.control_link`), and on the Unix socket of `lockstep up`. A module that owns a conversation
defines its messages as subclasses of `Message` and one `Codec` for each direction. What does not
fit a struct's types and bounds is refused before anybody looks at it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Generic, TypeVar, dataclass_transform

import msgspec

from lockstep.errors import KINDS, LockstepError, ProtocolError

Step = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]
"""A number of steps."""
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]
"""A number of workers, shards, hosts, batches, ... or an index of one."""
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
"""A size, or an offset, in bytes."""
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=1 << 16)]
JsonText = str
"""JSON: what users' code returns or is given. It may hold all that JSON can hold, and is handed on
as it is: `json.dumps` at one end, `json.loads` at the other."""
OsText = bytes
"""A path or an environment variable, as `os.fsencode` gives it: it may be no UTF-8."""
Label = Annotated[
    str, msgspec.Meta(max_length=256, pattern=r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z")
]
"""A name that may be shown on a terminal: it has no control characters."""
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""BLAKE3, in hexadecimal digits."""
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]

SHOWN = 200
"""Characters of an error that are shown."""


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(msgspec.field,))
class Message(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op"
):
    """Base of all messages. A subclass sets its `tag`, by default the class's own name."""


M = TypeVar("M")


class Codec(Generic[M]):
    """Encodes and decodes the messages of one direction of a conversation."""

    def __init__(self, kinds: Any, broken: str = "a message is not as expected") -> None:
        """`kinds`: a subclass of `Message`, or a union of several. `broken` says what is wrong with
        anything else."""
        self._broken = broken
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(kinds, strict=True)
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_as_plain)

    def encode(self, message: M) -> bytes:
        """The bytes of a message."""
        return self._encoder.encode(message)

    def decode(self, data: bytes | memoryview) -> M:
        """The message in these bytes.

        Raises:
            ProtocolError: they are not one of the expected messages, or a value is out of bounds.
        """
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(
                self._broken,
                expected="one of the messages of this conversation, with values within bounds",
                found=ascii(str(error))[:SHOWN],
            ) from error


def encode(message: Message) -> bytes:
    """The bytes of a message of any kind.

    Raises:
        ProtocolError: it holds what cannot be sent, such as a number of more than 64 bits.
    """
    try:
        return msgspec.msgpack.encode(message, enc_hook=_as_plain)
    except (OverflowError, UnicodeEncodeError, TypeError, RecursionError) as error:
        raise ProtocolError(
            f"a message {type(message).__name__} cannot be sent",
            expected="numbers of at most 64 bits, texts, lists and mappings",
            found=ascii(str(error))[:SHOWN],
        ) from error


MAX_DEPTH, MAX_VALUES = 16, 100_000
"""Of values whose form is not known: how deep they may be nested, and how many there may be."""


def check_plain(value: object) -> None:
    """Check that a value of a form that is not known holds nothing but what JSON can hold.

    Raises:
        ValueError: it holds something else, a number that is not finite, or too much. msgspec makes
            it a refusal of the message where a struct's `__post_init__` raises it.
    """
    level, count = [value], 0
    for _ in range(MAX_DEPTH):
        count += len(level)
        if count > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES:,} values")
        below: list[object] = []
        for each in level:
            if isinstance(each, dict):
                if not all(isinstance(key, str) for key in each):
                    raise ValueError("a mapping with a key that is no text")
                below += each.values()
            elif isinstance(each, list | tuple):
                below += each
            elif isinstance(each, float) and not math.isfinite(each):
                raise ValueError("a number that is not finite")
            elif not isinstance(each, str | int | float | None):
                raise ValueError(f"a value of type {type(each).__name__}")
        if not below:
            return
        level = below
    raise ValueError(f"nested more than {MAX_DEPTH} deep")


def printable(text: str) -> str:
    """A text that somebody else has sent, with all but its lines and spaces made visible: nothing
    in it can move a cursor, or pass for a line of another's."""
    shown = (
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
        for char in text
    )
    return "".join(shown)


MAX_ERROR_TEXT = 8000
"""Characters of each part of an error that are sent."""


class ErrorMessage(Message):
    """An error, to be raised elsewhere."""

    kind: Name
    """The name of its class."""
    what: Text
    expected: Text = ""
    found: Text = ""
    fix: Text = ""

    @staticmethod
    def of(error: LockstepError) -> ErrorMessage:
        """An error, cut to a length that can be sent."""
        parts = (error.what, error.expected, error.found, error.fix)
        what, expected, found, fix = (
            _cut(part.encode(errors="backslashreplace").decode()) for part in parts
        )
        return ErrorMessage(
            kind=type(error).__name__, what=what, expected=expected, found=found, fix=fix
        )

    def error(self) -> LockstepError:
        """The error, in a form that can be shown; of the tree's root if its class is unknown."""
        return KINDS.get(self.kind, LockstepError)(
            printable(self.what),
            expected=printable(self.expected),
            found=printable(self.found),
            fix=printable(self.fix),
        )


def _cut(text: str) -> str:
    """A text of at most `MAX_ERROR_TEXT` characters: its beginning and its end, which in a
    traceback says most."""
    if len(text) <= MAX_ERROR_TEXT:
        return text
    half = MAX_ERROR_TEXT // 2 - 2
    return f"{text[:half]}\n…\n{text[-half:]}"


def _as_plain(value: Any) -> Any:
    """A number or text of a subclass, such as `numpy.float64`, as what it is."""
    for kind in (str, float, int):
        if isinstance(value, kind):
            return kind(value)
    raise NotImplementedError(f"a message cannot hold a {type(value).__name__}")
