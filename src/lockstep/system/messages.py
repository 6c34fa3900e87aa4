"""Typed messages: frozen structs, encoded as MessagePack and decoded strictly.

The one mechanism for every channel: between processes of a host (`unix_channel`), between hosts
(`net.control_link`), and on the Unix socket of `lockstep up`. A module that owns a conversation
defines its messages as subclasses of `Message` and one `Codec` for each direction. What does not
fit a struct's types and bounds is refused before anybody looks at it.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, TypeVar, dataclass_transform

import msgspec

from lockstep.errors import ProtocolError

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

SHOWN = 200
"""Characters of an error that are shown."""


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Message(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op"
):
    """Base of all messages. A subclass sets its `tag`, by default the class's own name."""


M = TypeVar("M")


class Codec(Generic[M]):
    """Encodes and decodes the messages of one direction of a conversation."""

    def __init__(self, kinds: Any) -> None:
        """`kinds`: a subclass of `Message`, or a union of several."""
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
                "a message is not as expected",
                expected="one of the messages of this conversation, with values within bounds",
                found=ascii(str(error))[:SHOWN],
            ) from error


def _as_plain(value: Any) -> Any:
    """A number or text of a subclass, such as `numpy.float64`, as what it is."""
    for kind in (str, float, int):
        if isinstance(value, kind):
            return kind(value)
    raise NotImplementedError(f"a message cannot hold a {type(value).__name__}")
