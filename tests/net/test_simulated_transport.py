"""The network in memory: scripted faults happen where they are scripted, and time is scripted."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from lockstep.errors import NetworkError, PeerClosedError, PeerTimeoutError
from lockstep.net import simulated_transport as memory
from lockstep.net.frames import HEADER, Kind
from lockstep.net.simulated_transport import MemoryTransport, Network, NetworkFault
from lockstep.net.transport import Key, Pending
from tests.support.tls_hosts import SAID, Said

LONG = 1000.0
"""Scripted seconds."""


def send(
    source: MemoryTransport, target: MemoryTransport, step: int, size: int = 100
) -> tuple[Pending, Pending, bytearray]:
    """A tensor of this step's bytes on its way; returns the send, the receipt, and its memory."""
    into = bytearray(size)
    receipt = target.expect(source.node, Key(Kind.PARTIAL, step), memoryview(into))
    sent = source.send(target.node, Key(Kind.PARTIAL, step), memoryview(bytes([step]) * size))
    return sent, receipt, into


def test_time_passes_only_while_all_wait() -> None:
    network = Network()
    a, b = network.join("a", codec=SAID), network.join("b", codec=SAID)
    began = time.monotonic()
    assert network.now == 0.0
    sent, receipt, _ = send(a, b, 1)
    receipt.wait(LONG)
    sent.wait(LONG)
    assert network.now == memory.LATENCY
    with pytest.raises(PeerTimeoutError, match="host a did not answer in time"):
        b.hear(LONG)
    assert network.now == memory.LATENCY + LONG
    assert time.monotonic() - began < LONG / 2


def test_delay() -> None:
    fault = NetworkFault(source="a", target="b", frame=2, kind="delay", seconds=5.0)
    network = Network(faults=[fault])
    a, b = network.join("a", codec=SAID), network.join("b", codec=SAID)
    arrivals = []
    for _, receipt, into in [send(a, b, step) for step in (1, 2, 3)]:
        receipt.wait(LONG)
        arrivals.append(round(network.now))
        assert into[0] == len(arrivals)
    assert arrivals == [0, 5, 5]
    assert network.fired == [fault]


@pytest.mark.parametrize("keep", [0, 1, HEADER.size, HEADER.size + 40])
def test_cut(keep: int) -> None:
    fault = NetworkFault(source="a", target="b", frame=2, kind="cut", keep=keep)
    network = Network(faults=[fault])
    a, b = network.join("a", codec=SAID), network.join("b", codec=SAID)
    (_, whole, _), (sent, cut, into) = send(a, b, 1), send(a, b, 2)
    whole.wait(LONG)
    with pytest.raises(PeerClosedError, match="host a closed the connection") as caught:
        cut.wait(LONG)
    come = max(0, keep - HEADER.size)
    assert into == b"\x02" * come + bytes(100 - come)
    assert caught.value.expected == "partial 0 of step 2 from host a"
    if keep >= HEADER.size:
        assert f"{come} of 100 bytes of partial 0 of step 2" in caught.value.found
    elif keep:
        assert "1 of 28 bytes of a header" in caught.value.found
    with pytest.raises(PeerClosedError, match="host b"):
        sent.wait(LONG)
    assert b.hear(LONG).error is not None
    assert a.hear(LONG).error is not None
    assert network.fired == [fault]


def test_drop_is_one_way_and_silent() -> None:
    fault = NetworkFault(source="a", target="b", frame=2, kind="drop")
    network = Network(faults=[fault])
    a, b = network.join("a", codec=SAID), network.join("b", codec=SAID)
    send(a, b, 1)[1].wait(LONG)
    sent, receipt, _ = send(a, b, 2)
    a.tell("b", Said())
    for wait in (receipt.wait, sent.wait, b.hear):
        with pytest.raises(PeerTimeoutError):
            wait(LONG)
    send(b, a, 3)[1].wait(LONG)
    assert a.peers == ("b",)
    assert network.fired == [fault]


def test_stall_is_silent_both_ways_and_leaves_others_alone() -> None:
    fault = NetworkFault(source="a", target="b", frame=1, kind="stall")
    network = Network(faults=[fault])
    a, b, c = (
        network.join("a", codec=SAID),
        network.join("b", codec=SAID),
        network.join("c", codec=SAID),
    )
    for source, target in ((a, b), (b, a)):
        with pytest.raises(PeerTimeoutError, match=f"host {source.node} did not answer"):
            send(source, target, 1)[1].wait(LONG)
    send(a, c, 2)[1].wait(LONG)
    send(c, b, 3)[1].wait(LONG)
    assert network.fired == [fault]


def test_close() -> None:
    fault = NetworkFault(source="a", target="b", frame=2, kind="close")
    network = Network(faults=[fault])
    a, b = network.join("a", codec=SAID), network.join("b", codec=SAID)
    (_, whole, _), (_, missing, _) = send(a, b, 1), send(a, b, 2)
    whole.wait(LONG)
    with pytest.raises(PeerClosedError, match="host a") as caught:
        missing.wait(LONG)
    assert caught.value.found == "a goodbye"
    assert network.fired == [fault]


def test_kill() -> None:
    network = Network()
    a, b, c = (
        network.join("a", codec=SAID),
        network.join("b", codec=SAID),
        network.join("c", codec=SAID),
    )
    _, receipt, _ = send(a, b, 1)
    network.at(5.0, lambda: network.kill("a"))
    receipt.wait(LONG)
    waiting = b.expect("a", Key(Kind.PARTIAL, 2), memoryview(bytearray(1)))
    with pytest.raises(PeerClosedError, match="host a"):
        waiting.wait(LONG)
    assert network.now == 5.0
    assert [each.hear(LONG).peer for each in (b, c)] == ["a", "a"]
    send(b, c, 3)[1].wait(LONG)
    assert (b.peers, c.peers) == (("c",), ("b",))


def test_several_threads() -> None:
    """Each sends to all others and waits; the clock ends where it does with one thread."""
    names = ("a", "b", "c")
    network = Network(parties=len(names))
    hosts = {name: network.join(name) for name in names}

    def work(name: str) -> bool:
        mine, others = hosts[name], [other for other in names if other != name]
        for step in range(20):
            into = {other: bytearray(10) for other in others}
            key, data = Key(Kind.REDUCED, step), bytes([step]) * 10
            pending = [mine.expect(other, key, memoryview(into[other])) for other in others]
            pending += [mine.send(other, key, memoryview(data)) for other in others]
            for each in pending:
                each.wait(LONG)
            assert all(memory == data for memory in into.values())
        with pytest.raises(PeerTimeoutError):
            mine.hear(LONG)
        return True

    with ThreadPoolExecutor(len(names)) as pool:
        assert all(pool.map(work, names))
    assert LONG <= network.now < LONG + 1


def test_a_clock_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "STUCK_SECONDS", 0.05)
    network = Network(parties=2)
    a, _ = network.join("a", codec=SAID), network.join("b", codec=SAID)
    with pytest.raises(NetworkError, match="the scripted clock stands still") as caught:
        a.hear(LONG)
    assert caught.value.expected == "that 2 threads wait for the network"
