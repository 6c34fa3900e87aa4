"""The contract of transports, for each of them."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.errors import (
    NetworkError,
    PeerClosedError,
    PeerTimeoutError,
    ProtocolError,
    RefusedError,
)
from lockstep.net.frames import Kind
from lockstep.net.transport import Key
from tests.support import tls_hosts as hosts
from tests.support.tls_hosts import FACTS, LIMIT, Cluster, Open, Said, opener

MB = 1 << 20
SOON = 0.05
"""Seconds after which a wait that cannot end gives up."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(Path(tmp_path_factory.mktemp("cluster")))


@pytest.fixture(params=hosts.KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> hosts.Kind:
    found: hosts.Kind = request.param
    return found


@pytest.fixture
def opened(kind: hosts.Kind, cluster: Cluster) -> Iterator[Open]:
    with opener(kind, cluster) as open_hosts:
        yield open_hosts


def key(step: int, tag: int = 0, kind: Kind = Kind.PARTIAL) -> Key:
    return Key(kind, step, tag)


def view(memory: bytes | bytearray) -> memoryview:
    return memoryview(memory)


def test_bytes_arrive_whole_whatever_the_order(opened: Open) -> None:
    a, b = opened("a", "b")
    sizes = (0, 1, 1000, 16 << 10, (16 << 10) + 1, MB + 7)
    sent = [os.urandom(size) for size in sizes]
    into = [bytearray(size) for size in sizes]
    receipts = [
        b.expect("a", key(5, index), view(into[index])) for index in reversed(range(len(sizes)))
    ]
    sends = [a.send("b", key(5, index), view(data)) for index, data in enumerate(sent)]
    for pending in (*receipts, *sends):
        pending.wait(LIMIT)
        assert pending.done()
    assert into == sent


def test_the_same_key_again_and_again(opened: Open) -> None:
    a, b = opened("a", "b")
    into = bytearray(100)
    for number in range(20):
        sent = bytes([number]) * 100
        receipt, send = b.expect("a", key(1), view(into)), a.send("b", key(1), view(sent))
        receipt.wait(LIMIT)
        send.wait(LIMIT)
        assert into == sent


def test_kinds_steps_and_tags_are_told_apart(opened: Open) -> None:
    a, b = opened("a", "b")
    keys = [
        Key(kind, step, tag)
        for kind in (Kind.PARTIAL, Kind.REDUCED, Kind.STATE)
        for step in (0, 8191)
        for tag in (0, 65535)
    ]
    into = {each: bytearray(8) for each in keys}
    receipts = [b.expect("a", each, view(into[each])) for each in keys]
    sends = [a.send("b", each, view(f"{index:8}".encode())) for index, each in enumerate(keys)]
    for pending in (*receipts, *sends):
        pending.wait(LIMIT)
    assert [int(into[each]) for each in keys] == list(range(len(keys)))


def test_all_directions_at_once(opened: Open) -> None:
    """Everybody sends first, more than any buffer holds, and then waits for its own sends."""
    names = ("a", "b", "c")
    transports = dict(zip(names, opened(*names), strict=True))
    pairs = list(itertools.permutations(names, 2))
    sent = {pair: os.urandom(5 * MB + index) for index, pair in enumerate(pairs)}
    into = {pair: bytearray(len(sent[pair])) for pair in pairs}
    sends = [transports[x].send(y, key(1), view(sent[x, y])) for x, y in pairs]
    receipts = [transports[y].expect(x, key(1), view(into[x, y])) for x, y in pairs]
    for pending in (*sends, *receipts):
        pending.wait(LIMIT)
    assert into == sent


def test_sent_before_it_is_expected(opened: Open) -> None:
    a, b = opened("a", "b")
    data, into = os.urandom(3 * MB), bytearray(3 * MB)
    send = a.send("b", key(1), view(data))
    a.tell("b", Said(text="sent"))
    assert b.hear(LIMIT).message == Said(text="sent")  # it overtakes the tensor
    receipt = b.expect("a", key(1), view(into))
    receipt.wait(LIMIT)
    send.wait(LIMIT)
    assert into == data


def test_messages_keep_their_order(opened: Open) -> None:
    a, b, c = opened("a", "b", "c")
    for number in range(50):
        a.tell("c", Said(number=number, text="ü" * number))
        b.tell("c", Said(number=number))
    heard = [c.hear(LIMIT) for _ in range(100)]
    for peer in ("a", "b"):
        numbers = [
            each.message.number
            for each in heard
            if each.peer == peer and isinstance(each.message, Said)
        ]
        assert numbers == list(range(50))
    assert heard[-1].message is not None


def test_hearing_has_a_limit(opened: Open) -> None:
    a, _ = opened("a", "b")
    with pytest.raises(PeerTimeoutError, match="host b did not answer in time") as caught:
        a.hear(SOON)
    assert caught.value.expected == "a message within 0.05 s"


def test_a_receipt_has_a_limit(opened: Open) -> None:
    a, _ = opened("a", "b")
    receipt = a.expect("b", key(7, 3), view(bytearray(10)))
    began = time.monotonic()
    with pytest.raises(PeerTimeoutError, match="b") as caught:
        receipt.wait(SOON)
    assert time.monotonic() - began < LIMIT
    assert "partial 3 of step 7 from host b within 0.05 s" in caught.value.expected
    assert not receipt.done()


def test_a_send_has_a_limit(opened: Open) -> None:
    a, _ = opened("a", "b")
    send = a.send("b", key(7, 3), view(bytes(32 * MB)))  # more than sockets hold
    with pytest.raises(PeerTimeoutError, match="b") as caught:
        send.wait(SOON)
    assert "host b takes partial 3 of step 7" in caught.value.expected


def test_messages_have_a_limit(opened: Open) -> None:
    a, b = opened("a", "b")
    with pytest.raises(ProtocolError, match="a frame breaks the protocol"):
        a.tell("b", Said(text="x" * MB))
    a.tell("b", Said(text="x"))
    assert b.hear(LIMIT).message == Said(text="x")


def test_only_tensors_have_keys(opened: Open) -> None:
    a, _ = opened("a", "b")
    with pytest.raises(ProtocolError, match=r"(no tensor|cannot send)"):
        a.expect("b", key(0, 0, Kind.CONTROL), view(bytearray(1)))


def test_memory_with_gaps(opened: Open) -> None:
    a, _ = opened("a", "b")
    with pytest.raises(NetworkError, match="gaps"):
        a.expect("b", key(0), view(bytearray(8))[::2])
    with pytest.raises(NetworkError, match="gaps"):
        a.send("b", key(0), view(bytearray(8))[::2])


def test_unknown_hosts(opened: Open) -> None:
    a, _ = opened("a", "b")
    with pytest.raises(PeerClosedError, match="host z"):
        a.send("z", key(0), view(b"1"))
    with pytest.raises(PeerClosedError, match="host z"):
        a.expect("z", key(0), view(bytearray(1)))
    with pytest.raises(PeerClosedError, match="host z"):
        a.tell("z", Said())
    a.drop("z", "it is not there")
    assert a.peers == ("b",)


def test_a_peer_that_closes(opened: Open, kind: hosts.Kind) -> None:
    a, b = opened("a", "b")
    receipt = a.expect("b", key(2), view(bytearray(MB)))
    b.tell("a", Said(text="last words"))
    b.close()
    with pytest.raises(PeerClosedError, match="host b") as caught:
        receipt.wait(LIMIT)
    assert caught.value.expected == "partial 0 of step 2 from host b"
    assert not receipt.done()
    assert a.hear(LIMIT).message == Said(text="last words")
    if kind.tells_losses:
        heard = a.hear(LIMIT)
        assert heard.peer == "b"
        assert isinstance(heard.error, PeerClosedError)
        assert "goodbye" in heard.error.found
        with pytest.raises(PeerTimeoutError):
            a.hear(SOON)
    assert a.peers == ()
    for call in (
        lambda: a.send("b", key(3), view(b"1")).wait(LIMIT),
        lambda: a.expect("b", key(3), view(bytearray(1))).wait(LIMIT),
        lambda: a.tell("b", Said()),
    ):
        with pytest.raises(PeerClosedError, match="host b"):
            call()


def test_after_closing_nothing_goes(opened: Open) -> None:
    a, _ = opened("a", "b")
    receipt = a.expect("b", key(2), view(bytearray(10)))
    a.close()
    a.close()
    with pytest.raises(PeerClosedError):
        receipt.wait(LIMIT)
    with pytest.raises(PeerClosedError):
        a.send("b", key(3), view(b"1"))
    with pytest.raises(PeerClosedError):
        a.expect("b", key(3), view(bytearray(1)))


def test_what_was_sent_before_closing_arrives(opened: Open, kind: hosts.Kind) -> None:
    if not kind.tells_losses:
        pytest.skip("gloo closes at once: its sends have to be waited for")
    a, b = opened("a", "b")
    data, into = os.urandom(8 * MB), bytearray(8 * MB)
    receipt = a.expect("b", key(1), view(into))
    send = b.send("a", key(1), view(data))
    b.tell("a", Said(text="bye"))
    b.close()
    receipt.wait(LIMIT)
    send.wait(LIMIT)
    assert into == data
    assert a.hear(LIMIT).message == Said(text="bye")
    assert isinstance(a.hear(LIMIT).error, PeerClosedError)


def test_one_loss_leaves_the_others_alone(opened: Open, kind: hosts.Kind) -> None:
    if not kind.tells_losses:
        pytest.skip("gloo loses all peers at once")
    a, b, c = opened("a", "b", "c")
    into = bytearray(MB)
    lost, kept = a.expect("b", key(1), view(bytearray(5))), a.expect("c", key(1), view(into))
    a.drop("b", "it is in the way")
    with pytest.raises(PeerClosedError, match="host b"):
        lost.wait(LIMIT)
    heard = b.hear(LIMIT)
    assert heard.peer == "a"
    assert isinstance(heard.error, PeerClosedError)
    send = c.send("a", key(1), view(b"c" * MB))
    kept.wait(LIMIT)
    send.wait(LIMIT)
    assert into == b"c" * MB
    assert a.peers == ("c",)
    assert c.peers == ("a", "b")


def test_dropped_memory_is_not_written_again(opened: Open, kind: hosts.Kind) -> None:
    if not kind.tells_losses:
        pytest.skip("gloo drops all peers at once")
    a, b = opened("a", "b")
    into = bytearray(32 * MB)
    a.expect("b", key(1), view(into))
    b.send("a", key(1), view(b"b" * (32 * MB)))
    a.drop("b", "half of it may be here")
    into[:] = bytes(len(into))
    heard = b.hear(LIMIT)  # the connections are gone
    assert heard.error is not None
    assert not any(memoryview(into)[::4096])


def test_another_size_than_expected(opened: Open, kind: hosts.Kind) -> None:
    if not kind.checks_sizes:
        pytest.skip("gloo does not check sizes by name")
    a, b = opened("a", "b")
    receipt = a.expect("b", key(4, 2), view(bytearray(10)))
    b.send("a", key(4, 2), view(bytes(11)))
    with pytest.raises(ProtocolError, match="host b sends partial 2 of step 4 in another size"):
        receipt.wait(LIMIT)
    assert isinstance(a.hear(LIMIT).error, ProtocolError)
    assert isinstance(b.hear(LIMIT).error, PeerClosedError)


def test_a_key_is_expected_once(opened: Open, kind: hosts.Kind) -> None:
    if not kind.checks_sizes:
        pytest.skip("gloo does not know what is expected")
    a, b = opened("a", "b")
    into = bytearray(1)
    receipt = a.expect("b", key(4), view(into))
    with pytest.raises(NetworkError, match="partial 0 of step 4 from host b is expected already"):
        a.expect("b", key(4), view(bytearray(1)))
    b.send("a", key(4), view(b"x")).wait(LIMIT)
    receipt.wait(LIMIT)
    assert into == b"x"


def test_what_nobody_expects_is_named(opened: Open, kind: hosts.Kind) -> None:
    if not kind.checks_sizes:
        pytest.skip("gloo does not know what is expected")
    a, b = opened("a", "b")
    receipt = a.expect("b", key(4), view(bytearray(1)))
    b.send("a", key(3, 9), view(b"x"))
    b.send("a", key(4), view(b"y"))
    b.tell("a", Said())
    a.hear(LIMIT)
    with pytest.raises(PeerTimeoutError) as caught:
        receipt.wait(1.0)
    assert "partial 9 of step 3" in caught.value.found


def test_hosts_that_differ_are_refused_by_name(opened: Open) -> None:
    other = {**FACTS, "torch": "2.12.1", "code": "ab"}
    with pytest.raises(RefusedError, match="would not compute the same bits") as caught:
        opened("a", "b", facts={"b": other})
    assert "code" in caught.value.fix
    assert "torch" in caught.value.fix
    assert "2.12.1" in str(caught.value)
    assert "probe" not in str(caught.value)
