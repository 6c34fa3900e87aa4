"""Messages between processes, and errors that cross them."""

from __future__ import annotations

import enum
import json
import os
import pickle
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import KINDS, LockstepError, ProtocolError
from lockstep.system.messages import MAX_ERROR_TEXT, Codec, ErrorMessage, JsonText, Message
from lockstep.system.unix_channel import INLINE, Channel, Closed, MessageChannel

# Messages between processes.


@pytest.fixture
def ends() -> Any:
    left, right = Channel.pair()
    yield left, right
    left.close()
    right.close()


@pytest.mark.parametrize("size", [0, 1, INLINE - 1, INLINE, INLINE + 1, 5_000_000])
def test_messages_of_any_length(ends: tuple[Channel, Channel], size: int) -> None:
    left, right = ends
    left.send(b"x" * size)
    assert right.receive(1) == (b"x" * size, [])


@given(st.binary())
def test_messages_of_any_content(message: bytes) -> None:
    left, right = Channel.pair()
    try:
        left.send(message)
        assert right.receive(1) == (message, [])
    finally:
        left.close()
        right.close()


class Count(enum.IntEnum):
    """Numbers with names."""

    ONE = 1


class Note(Message):
    """A message with what users may give: any JSON, any text and number."""

    values: dict[str, bool | int | float | str | None]
    json: JsonText


class Unknown(Message):
    """One that is not expected."""


@given(
    st.dictionaries(
        st.text(),
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False)
        | st.text(),
    ),
    st.dictionaries(st.text(st.characters()), st.integers()),
)
def test_typed_messages(values: dict[str, Any], given: dict[str, Any]) -> None:
    """JSON may hold integers of any length, and halves of characters."""
    codec: Codec[Note] = Codec(Note)
    left, right = (MessageChannel(end, codec, codec) for end in Channel.pair())
    try:
        note = Note(values=values, json=json.dumps(given))
        left.send(note)
        assert right.receive(1) == (note, [])
        assert json.loads(note.json) == given
    finally:
        left.close()
        right.close()


@pytest.mark.parametrize("value", [numpy.float64(0.1), numpy.str_("x"), Count.ONE])
def test_numbers_and_texts_of_subclasses(value: Any) -> None:
    codec: Codec[Note] = Codec(Note)
    crossed = codec.decode(codec.encode(Note(values={"it": value}, json="")))
    assert crossed.values == {"it": value}
    assert type(crossed.values["it"]) in (float, str, int)


def test_unexpected_messages_are_refused(ends: tuple[Channel, Channel]) -> None:
    expected: Codec[Note] = Codec(Note)
    sent: Codec[Unknown] = Codec(Unknown)
    left, right = MessageChannel(ends[0], sent, expected), MessageChannel(ends[1], expected, sent)
    left.send(Unknown())
    assert right.receive(1) == (Unknown(), [])
    ends[1].send(sent.encode(Unknown()))
    with pytest.raises(ProtocolError):
        left.receive(1)


@pytest.mark.parametrize("size", [10, 2 * INLINE])
def test_descriptors_arrive_in_order(ends: tuple[Channel, Channel], size: int) -> None:
    left, right = ends
    pipes = [os.pipe() for _ in range(3)]
    left.send(b"x" * size, [write for _, write in pipes])
    message, fds = right.receive(1)
    assert len(message) == size
    assert len(fds) == 3
    for number, fd in enumerate(fds):
        assert not os.get_inheritable(fd)
        os.write(fd, bytes([number]))
        os.close(fd)
    for number, (read, write) in enumerate(pipes):
        assert os.read(read, 9) == bytes([number])
        os.close(read)
        os.close(write)


def test_messages_keep_their_boundaries(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    for number in range(20):
        left.send(bytes([number]) * (1 + number * 5000))
    received = [right.receive(1)[0] for _ in range(20)]
    assert received == [bytes([number]) * (1 + number * 5000) for number in range(20)]
    assert not right.ready()


def test_a_closed_channel_says_so(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    left.send(b"last")
    left.close()
    assert right.receive(1)[0] == b"last"
    with pytest.raises(Closed):
        right.receive(1)
    for size in (1, 2 * INLINE):
        with pytest.raises(Closed):
            right.send(b"x" * size)


def test_a_silent_channel_times_out(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError):
        ends[1].receive(0.01)


# Errors.

ERRORS: Codec[ErrorMessage] = Codec(ErrorMessage)


@pytest.mark.parametrize("kind", KINDS.values())
def test_errors_cross_processes(kind: type[LockstepError]) -> None:
    error = kind("what", expected="this", found="that", fix="do so")
    crossed = ERRORS.decode(ERRORS.encode(ErrorMessage.of(error))).error()
    for found in (crossed, pickle.loads(pickle.dumps(error))):
        assert type(found) is kind
        assert str(found) == str(error)
        assert vars(found) == vars(error)


def test_error_message_has_only_what_is_known() -> None:
    assert str(LockstepError("what")) == "what"
    whole = str(LockstepError("what", expected="this", found="that", fix="do so"))
    assert whole == "what\n  expected: this\n  found:    that\n  next:     do so"


def test_unknown_errors_are_still_errors() -> None:
    assert type(ErrorMessage(kind="FromTheFuture", what="what").error()) is LockstepError


def test_of_a_long_error_both_ends_are_kept() -> None:
    crossed = ErrorMessage.of(LockstepError("begin" + "x" * 100_000 + "end"))
    assert len(crossed.what) <= MAX_ERROR_TEXT
    assert crossed.what.startswith("begin")
    assert crossed.what.endswith("end")


def test_every_error_is_listed() -> None:
    def below(kind: type[LockstepError]) -> set[type[LockstepError]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    assert set(KINDS.values()) == below(LockstepError)
