"""Frames, hellos and tokens as bytes: what is right goes through, and what is not is refused."""

from __future__ import annotations

import itertools
import math

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import IdentityError, ProtocolError, RefusedError
from lockstep.net.enrolment import Limiter
from lockstep.net.frames import (
    HEADER,
    LIMITS,
    MAGIC,
    MAX_STEP,
    MAX_TAG,
    TENSORS,
    VERSION,
    Frame,
    Header,
    Kind,
    Reader,
    head,
    message_frame,
    parse_head,
)
from lockstep.net.handshake import HELLO, Hello, check_hello, differences, gather
from lockstep.net.join_tokens import PREFIX, Token, TokenBook, parse_token
from lockstep.system.messages import encode
from tests.support.fuzzing import ended, fuzz

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=10,
)
TOKENS = st.builds(
    Token,
    host=st.from_regex(r"[a-z0-9.:]{1,30}", fullmatch=True),
    port=st.integers(1, 65535),
    node=st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True),
    fingerprint=st.binary(min_size=32, max_size=32),
    secret=st.binary(min_size=32, max_size=32),
    expiry=st.integers(0, 2**63),
)


def read(stream: bytes, cuts: list[int] | None = None) -> list[Frame]:
    """The frames in a stream that comes in pieces; tensors go into memory of their own."""
    reader = Reader(target=lambda header: memoryview(bytearray(header.length)))
    edges = [0, *sorted({min(cut, len(stream)) for cut in cuts or []}), len(stream)]
    pieces = [stream[start:stop] for start, stop in itertools.pairwise(edges)]
    return [frame for piece in pieces for frame in reader.feed(piece)]


@st.composite
def frames(draw: st.DrawFn) -> tuple[Header, bytes]:
    kind = draw(st.sampled_from(Kind))
    if kind in TENSORS:
        body = draw(st.binary(max_size=200))
        step, tag = draw(st.integers(0, MAX_STEP)), draw(st.integers(0, MAX_TAG))
        return Header(kind=kind, step=step, tag=tag, length=len(body)), body
    limit = min(LIMITS[kind], 4000)
    fields = msgspec.msgpack.encode(draw(st.dictionaries(st.text(max_size=8), JSON, max_size=4)))
    body = fields if len(fields) <= limit else b""
    return Header(kind=kind, length=len(body)), body


@fuzz(200)
@given(st.lists(frames(), max_size=5), st.lists(st.integers(0, 400), max_size=8))
def test_what_is_sent_is_read(sent: list[tuple[Header, bytes]], cuts: list[int]) -> None:
    stream = b"".join(
        head(header.kind, step=header.step, tag=header.tag, length=header.length) + body
        for header, body in sent
    )
    assert [(frame.header, bytes(frame.body)) for frame in read(stream, cuts)] == sent
    ended("read as it was sent")


@fuzz(500)
@given(
    st.binary(max_size=27) | st.binary(min_size=28, max_size=300),
    st.lists(st.integers(0, 300), max_size=4),
)
def test_random_bytes(stream: bytes, cuts: list[int]) -> None:
    """They are refused as soon as a header is there, wherever the stream is cut."""
    if len(stream) < HEADER.size:
        assert read(stream, cuts) == []
        ended("too short for a header: waits for more")
    else:
        with pytest.raises(ProtocolError, match="a frame breaks the protocol") as caught:
            read(stream, cuts)
        ended(caught.value)


@fuzz(500)
@given(frames(), st.integers(0, HEADER.size - 1), st.integers(1, 255))
def test_an_altered_header(sent: tuple[Header, bytes], place: int, change: int) -> None:
    """Every change of it is refused, or is another header within all bounds."""
    header, body = sent
    raw = bytearray(
        head(header.kind, step=header.step, tag=header.tag, length=header.length) + body
    )
    raw[place] ^= change
    if place < 5 or 6 <= place < 8:  # magic, version, flags
        with pytest.raises(ProtocolError) as caught:
            parse_head(raw[: HEADER.size])
        ended(caught.value)
        return
    try:
        changed = parse_head(raw[: HEADER.size])
    except ProtocolError as error:
        ended(error)
        return
    assert changed != header
    assert changed.length <= LIMITS[changed.kind]
    assert changed.kind in TENSORS or changed.step == changed.tag == 0
    ended("another header within all bounds")


@pytest.mark.parametrize("kind", Kind)
def test_lengths_are_bounded(kind: Kind) -> None:
    """Before memory is taken: a header alone is refused."""
    limit = LIMITS[kind]
    assert parse_head(head(kind, length=limit)).length == limit
    with pytest.raises(ProtocolError, match="at most"):
        head(kind, length=limit + 1)
    for length in (limit + 1, 2**64 - 1):
        stream = HEADER.pack(MAGIC, VERSION, kind, 0, 0, 0, length)
        with pytest.raises(ProtocolError, match="at most"):
            read(stream)


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (HEADER.pack(b"HTTP", VERSION, 5, 0, 0, 0, 0), "HTTP"),
        (HEADER.pack(MAGIC, VERSION + 1, 5, 0, 0, 0, 0), f"version {VERSION + 1}"),
        (HEADER.pack(MAGIC, VERSION, 99, 0, 0, 0, 0), "kind 99"),
        (HEADER.pack(MAGIC, VERSION, 5, 1, 0, 0, 0), "flags 0x1"),
        (HEADER.pack(MAGIC, VERSION, 5, 0, 7, 0, 0), "step 7"),
    ],
)
def test_each_rule_is_named(raw: bytes, found: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        parse_head(raw)
    assert found in caught.value.found


def test_kinds_that_do_not_belong_here() -> None:
    reader = Reader({Kind.CONTROL})
    with pytest.raises(ProtocolError, match="kind 1"):
        list(reader.feed(message_frame(Kind.HELLO, Hello(job="j", node="a"))))
    with pytest.raises(ProtocolError, match="no tensor on this connection"):
        list(Reader().feed(head(Kind.STATE, length=1)))


def test_a_tensor_goes_where_it_belongs_and_nowhere_else() -> None:
    memory = bytearray(20)
    reader = Reader(target=lambda header: memoryview(memory)[5:10])
    (frame,) = reader.feed(head(Kind.PARTIAL, step=3, tag=4, length=5) + b"hello")
    assert memory == bytes(5) + b"hello" + bytes(10)
    assert str(frame.header) == "partial 4 of step 3"
    with pytest.raises(ProtocolError, match="6 bytes"):
        list(reader.feed(head(Kind.PARTIAL, length=6)))


def test_how_far_a_frame_is() -> None:
    reader = Reader(target=lambda header: memoryview(bytearray(header.length)))
    assert reader.between
    list(reader.feed(head(Kind.PARTIAL, step=1, tag=2, length=5000)[:7]))
    assert not reader.between
    assert reader.describe() == "7 of 28 bytes of a header"
    list(reader.feed(head(Kind.PARTIAL, step=1, tag=2, length=5000)[7:] + bytes(3000)))
    assert reader.describe() == "3,000 of 5,000 bytes of partial 2 of step 1"
    list(reader.feed(bytes(2000)))
    assert reader.between


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\x01",
        b"\x81",
        msgspec.msgpack.encode({"op": "Hello", "job": math.nan, "node": "a"}),
        b"\xff",
        b"\x91" * 100_000,
        b"\x82\xa2op\xa5Hello\xa5facts" + b"\x81\xa1a" * 100_000,
        b"\xdb\xff\xff\xff\xff",
    ],
)
def test_bodies_that_are_no_messages(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        HELLO.decode(memoryview(body))


@fuzz(200)
@given(JSON)
def test_any_value_as_a_hello(value: object) -> None:
    message = value if isinstance(value, dict) else {"facts": value, "protocol": value}
    for body in (message, {"op": "Hello", **message}):
        with pytest.raises(ProtocolError, match="a hello breaks the protocol") as caught:
            HELLO.decode(msgspec.msgpack.encode(body))
        ended(caught.value)


@fuzz(200)
@given(st.sampled_from(["protocol", "job", "node", "facts"]), JSON)
def test_a_hello_with_an_altered_field(name: str, value: object) -> None:
    ours = Hello(job="j", node="a", facts={"torch": "1"})
    theirs = Hello(job="j", node="b", facts={"torch": "1"})
    assert HELLO.decode(encode(theirs)) == theirs
    message = msgspec.msgpack.decode(encode(theirs))
    check_hello(ours, theirs, "b")
    if value == message[name] and type(value) is type(message[name]):
        ended("the same hello")
        return
    message[name] = value
    with pytest.raises((ProtocolError, RefusedError)) as caught:
        check_hello(ours, HELLO.decode(msgspec.msgpack.encode(message)), "b")
    ended(caught.value)


def test_differences_are_named() -> None:
    ours, theirs = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}
    found = differences(ours, theirs)
    assert [(each.name, each.ours, each.theirs) for each in found] == [
        ("b", "2", "4"),
        ("c", "3", ""),
        ("d", "", "5"),
    ]
    assert differences(ours, ours) == ()
    hello = Hello(job="j", node="a", facts=ours)
    with pytest.raises(RefusedError) as caught:
        check_hello(hello, Hello(job="j", node="b", facts=theirs), "b")
    assert "b is 4 there, 2 here; c is not stated there, 3 here" in caught.value.found
    for wrong in (
        Hello(job="other", node="b", facts=ours),
        Hello(job="j", node="c", facts=ours),
        Hello(job="j", node="b", facts=ours, protocol=VERSION + 1),
    ):
        with pytest.raises(RefusedError, match="host b may not take part"):
            check_hello(hello, wrong, "b")
    with pytest.raises(RefusedError, match="host a may not take part"):
        check_hello(hello, hello, "a")


def test_the_facts_of_this_host() -> None:
    facts = gather(probe="p", code="c", data="d", fitted="f")
    assert facts["torch"] == torch.__version__
    assert {"numpy", "lockstep-dlp", "probe", "code", "data"} < set(facts)
    hello = Hello(job="j", node="a", facts=facts)
    assert HELLO.decode(encode(hello)) == hello


@fuzz(100)
@given(TOKENS)
def test_a_token_can_be_pasted(token: Token) -> None:
    assert parse_token(f"  {token.text()}\n") == token
    assert "secret" not in repr(token)
    ended("read as it was pasted")


@fuzz(300)
@given(TOKENS, st.data())
def test_a_cut_or_altered_token(token: Token, data: st.DataObject) -> None:
    text = token.text()
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("abcXYZ019-_=+/ é"))
    for wrong in (text[:place], text[:place] + other + text[place + 1 :], text + other, text * 2):
        if wrong.strip() != text:
            with pytest.raises(IdentityError, match="this is not a join token") as caught:
                parse_token(wrong)
            assert text[20:60] not in str(caught.value)
            assert caught.value.__cause__ is None
            ended(caught.value)


@fuzz(300)
@given(st.text(max_size=100), st.booleans())
def test_any_text_as_a_token(text: str, prefixed: bool) -> None:
    with pytest.raises(IdentityError, match="this is not a join token") as caught:
        parse_token(PREFIX + text if prefixed else text)
    ended(caught.value)


def test_a_token_is_used_once_and_expires() -> None:
    book = TokenBook()

    def issue(now: float) -> Token:
        return book.issue(host="h", port=1, node="a", fingerprint=bytes(32), seconds=60.0, now=now)

    first, second = issue(1000.0), issue(1000.0)
    book.redeem(first.secret, 1059.0)
    for secret, now, why in (
        (first.secret, 1059.0, "it was used before"),
        (second.secret, 1061.0, "it expired 1 s ago"),
        (bytes(32), 1000.0, "it is unknown here"),
        (b"", 1000.0, "it is unknown here"),
        (second.secret[:-1], 1000.0, "it is unknown here"),
    ):
        with pytest.raises(RefusedError, match="the join token was refused") as caught:
            book.redeem(secret, now)
        assert caught.value.found == why
    held = repr(vars(book))
    for token in (first, second):
        assert repr(token.secret) not in held
    issue(1e9)  # long after: the old ones are forgotten
    with pytest.raises(RefusedError) as caught:
        book.redeem(first.secret, 1e9)
    assert caught.value.found == "it is unknown here"


def test_attempts_are_limited_by_address() -> None:
    limiter = Limiter(burst=3, seconds=10.0, addresses=2)
    assert [limiter.admits("x", 0.0) for _ in range(5)] == [True, True, True, False, False]
    assert limiter.admits("y", 0.0)
    assert [limiter.admits("x", now) for now in (9.9, 10.0, 10.0)] == [False, True, False]
    assert [limiter.admits("x", 100.0) for _ in range(4)] == [True, True, True, False]
    limiter.admits("z", 100.0)  # two are remembered
    assert len(limiter._free_at) == 2
