"""Messages between processes, and errors that cross them."""

from __future__ import annotations

import json
import os
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import KINDS, LockstepError
from lockstep.errors import from_message as error_from
from lockstep.errors import to_message as message_of
from lockstep.system.unix_channel import INLINE, Channel, Closed

# Messages between processes.


@pytest.fixture
def ends() -> Any:
    left, right = Channel.pair()
    yield left, right
    left.close()
    right.close()


EMPTY = len(json.dumps({"text": ""}))


@pytest.mark.parametrize(
    "size", [0, 1, INLINE - EMPTY - 1, INLINE - EMPTY, INLINE - EMPTY + 1, 5_000_000]
)
def test_messages_of_any_length(ends: tuple[Channel, Channel], size: int) -> None:
    left, right = ends
    message = {"text": "x" * size}
    left.send(message)
    assert right.receive(1) == (message, [])


@given(
    st.dictionaries(
        st.text(),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    )
)
def test_messages_of_any_content(message: dict[str, Any]) -> None:
    left, right = Channel.pair()
    try:
        left.send(message)
        assert right.receive(1) == (message, [])
    finally:
        left.close()
        right.close()


@pytest.mark.parametrize("size", [10, 2 * INLINE])
def test_descriptors_arrive_in_order(ends: tuple[Channel, Channel], size: int) -> None:
    left, right = ends
    pipes = [os.pipe() for _ in range(3)]
    left.send({"text": "x" * size}, [write for _, write in pipes])
    message, fds = right.receive(1)
    assert len(message["text"]) == size
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
        left.send({"number": number, "text": "x" * (number * 5000)})
    assert [right.receive(1)[0]["number"] for _ in range(20)] == list(range(20))
    assert not right.ready()


def test_a_closed_channel_says_so(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    left.send({"last": True})
    left.close()
    assert right.receive(1)[0] == {"last": True}
    with pytest.raises(Closed):
        right.receive(1)
    for size in (1, 2 * INLINE):
        with pytest.raises(Closed):
            right.send({"text": "x" * size})


def test_a_silent_channel_times_out(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError):
        ends[1].receive(0.01)


# Errors.


@pytest.mark.parametrize("kind", KINDS.values())
def test_errors_cross_processes(kind: type[LockstepError]) -> None:
    error = kind("what", expected="this", found="that", fix="do so")
    crossed = error_from(json.loads(json.dumps(message_of(error))))
    for found in (crossed, pickle.loads(pickle.dumps(error))):
        assert type(found) is kind
        assert str(found) == str(error)
        assert vars(found) == vars(error)


def test_error_message_has_only_what_is_known() -> None:
    assert str(LockstepError("what")) == "what"
    whole = str(LockstepError("what", expected="this", found="that", fix="do so"))
    assert whole == "what\n  expected: this\n  found:    that\n  next:     do so"


def test_unknown_errors_are_still_errors() -> None:
    message = {**message_of(LockstepError("what")), "kind": "FromTheFuture"}
    assert type(error_from(message)) is LockstepError


def test_every_error_is_listed() -> None:
    def below(kind: type[LockstepError]) -> set[type[LockstepError]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    assert set(KINDS.values()) == below(LockstepError)
