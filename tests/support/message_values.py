"""Values for the fields of messages: ones that are right, and ones that cannot be."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from hypothesis import strategies as st

from lockstep.errors import ProtocolError
from lockstep.system.messages import Codec, Message, encode

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.sampled_from([-1, 2**31, 2**40 + 1, 2**62, 2**63, 10**18]),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, -1.0, 1e300]),
    st.text(max_size=20),
    st.sampled_from(["\x1b[2J", "a\nb", "\x00", "\x9b", "x" * 300, "\u2028"]),
    st.binary(max_size=20),
    st.lists(st.integers(), max_size=3).map(lambda _: []),
    st.sampled_from([[[]], {"a": {}}, {1: 2}, ["x"] * 50]),
)


def nested(depth: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def fields_of(message: Message) -> dict[str, Any]:
    """What a message looks like on its way."""
    found: dict[str, Any] = msgspec.msgpack.decode(encode(message))
    return found


def body(fields: Any) -> bytes:
    """The bytes of such fields."""
    return msgspec.msgpack.encode(fields)


def refuses(codec: Codec[Any], content: bytes) -> str:
    """Why a codec refuses this; raises AssertionError if it does not."""
    try:
        found = codec.decode(content)
    except ProtocolError as error:
        text = str(error)
        assert text.isascii()
        assert all(char.isprintable() or char == "\n" for char in text)
        return text
    raise AssertionError(f"this was taken: {found!r}")
