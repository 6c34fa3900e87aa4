"""Board relay: members on several hosts see what the others show, and no lie is taken for it."""

from __future__ import annotations

import functools
import gc
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lockstep.collectives.board_relay import HEAD, BoardRelay
from lockstep.errors import NetworkError
from lockstep.net.frames import Kind
from lockstep.net.transport import Key, Transport
from lockstep.slices.board import Board, PassRestarted
from lockstep.slices.board_memory import EPOCH_SHIFT, BoardMemory
from tests.slices.test_board import KIND, WAIT, together
from tests.support.tls_hosts import KINDS, Cluster, Open, opener

NAMES = ("a", "b", "c")
GENERATION = 7


@pytest.fixture
def connected(tmp_path: Path) -> Iterator[Open]:
    with opener(KINDS[0], Cluster(tmp_path)) as found:
        yield found
    gc.collect()  # transports, which may hold the last thing that came, are in cycles


class Hosts:
    """Boards of some hosts, each with a worker of one rank or two, and what connects them."""

    def __init__(self, transports: list[Transport], ranks: int = 1) -> None:
        self.names = [each.node for each in transports]
        self.ranks, self.failed = ranks, list[NetworkError]()
        self.memory = {name: BoardMemory.create(len(NAMES) * ranks) for name in self.names}
        self.relays = {
            each.node: BoardRelay(
                self.memory[each.node], each, self.names, each.node, teams=ranks,
                max_workers=ranks, generation=GENERATION, failed=self.failed.append,
            )
            for each in transports
        }  # fmt: skip
        for relay in self.relays.values():
            relay.start()

    def board(self, name: str, rank: int = 0) -> Board:
        """A member's end. It waits for so long alone."""
        last = time.monotonic() + WAIT

        def look() -> None:
            assert time.monotonic() < last

        lines = [position * self.ranks + rank for position in range(len(self.names))]
        return Board(
            self.memory[name], lines, lines[self.names.index(name)], GENERATION,
            spins=1, look=look, awaits=lambda _: None,
        )  # fmt: skip

    def close(self) -> None:
        for relay in self.relays.values():
            relay.stop()
            relay.close()
        self.relays.clear()  # what a transport looks at is unmapped with it
        for memory in self.memory.values():
            memory.close()


@pytest.fixture
def hosts(connected: Open) -> Iterator[Callable[..., Hosts]]:
    made: list[Hosts] = []

    def make(*names: str, ranks: int = 1) -> Hosts:
        made.append(Hosts(connected(*names), ranks))
        return made[-1]

    yield make
    for each in made:
        each.close()


def turns(hosts: Hosts, name: str, rank: int, count: int) -> list[float]:
    """Some turns of some exchanges, of sizes that grow; what is seen of the others."""
    own, seen = hosts.board(name, rank), []
    number = hosts.names.index(name)
    for turn in range(count):
        if own.leads:
            own.announce(turn)
        else:
            assert own.follow() == turn
        for each in range(turn % 4 + 1):
            own.show(
                KIND, [torch.full((1 + 900 * turn,), 100.0 * rank + turn * 10 + number + each)]
            )
            for place, other in enumerate(own.members):
                if other != own.worker_id:
                    (value,) = own.shown(other, KIND)
                    assert value is not None
                    assert value.min() == value.max()
                    seen.append(float(value[0] - place))
        told = own.finish(float(turn), 0, torch.tensor([number], dtype=torch.uint8))
        assert [int(each) for each in told.values() if each is not None] == [
            place for place in range(len(hosts.names)) if place != number
        ]
    return seen


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
def test_members_see_what_those_of_other_hosts_show(
    names: tuple[str, ...], hosts: Callable[..., Hosts]
) -> None:
    made = hosts(*names, ranks=2)
    found = together(*(
        functools.partial(turns, made, name, rank, 20) for name in names for rank in range(2)
    ))  # fmt: skip
    for index, seen in enumerate(found):
        wanted = [
            100.0 * (index % 2) + turn * 10 + each
            for turn in range(20) for each in range(turn % 4 + 1) for _ in names[1:]
        ]  # fmt: skip
        assert seen == wanted
    for relay in made.relays.values():
        relay.flush()
    assert not made.failed


def test_all_begin_again_with_one(hosts: Callable[..., Hosts]) -> None:
    """At random, anybody begins a shard again, at any exchange."""
    made = hosts(*NAMES)
    draw = random.Random(3)
    plan = [(draw.randrange(3), draw.randrange(3), draw.randrange(1, 5)) for _ in range(15)]

    def work(name: str) -> list[float]:
        own, seen = made.board(name), []
        number = made.names.index(name)
        for turn, (restarts, who, at) in enumerate(plan):
            own.announce(turn) if own.leads else own.follow()
            left = restarts
            while True:
                try:
                    for each in range(5):
                        if left and who == number and each == at:
                            left -= 1
                            raise PassRestarted
                        own.show(
                            KIND, [torch.tensor([turn * 10.0 + each + left * (who == number)])]
                        )
                        others = [m for m in own.members if m != own.worker_id]
                        found = [own.shown(other, KIND)[0] for other in others]
                        values = [0.0 if each is None else float(each) for each in found]
                    own.finish(float(turn), 0)
                    break
                except PassRestarted:
                    own.again()
            seen += values
        return seen

    found = together(*(functools.partial(work, name) for name in NAMES))
    assert found == [[turn * 10.0 + 4 for turn in range(15) for _ in range(2)]] * 3
    assert not made.failed


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ((GENERATION << EPOCH_SHIFT, 0, 1, 2, 64), b""),
        (((GENERATION + 1) << EPOCH_SHIFT, 0, 0, 0, 0), b""),
        ((GENERATION << EPOCH_SHIFT, -2, 0, 0, 0), b""),
        ((GENERATION << EPOCH_SHIFT, 0, 1, 0, 1 << 60), b""),
        ((GENERATION << EPOCH_SHIFT, 0, 0, 0, 64), b""),
        ((GENERATION << EPOCH_SHIFT, 0, 1, 0, 128), bytes(128)),
        ((GENERATION << EPOCH_SHIFT, 0, 1, 0, 64), b"\xff" * 64),
    ],
)
def test_what_cannot_be_shown_is_refused(
    head: tuple[int, ...], body: bytes, connected: Open
) -> None:
    """Another host sends it: the relay ends, with its name, and no worker sees anything of it."""
    one, other = connected("a", "b")
    memory, ended, failed = BoardMemory.create(2), threading.Event(), list[NetworkError]()

    def fail(error: NetworkError) -> None:
        failed.append(error)
        ended.set()

    relay = BoardRelay(
        memory, one, ["a", "b"], "a", teams=1, max_workers=1, generation=GENERATION, failed=fail
    )
    before = bytes(memory.words.map)
    relay.start()
    other.send("a", Key(Kind.SHOWN, 0, 0), memoryview(HEAD.pack(*head)))
    if body:
        other.send("a", Key(Kind.SHOWN, 0, 1), memoryview(body))
    assert ended.wait(WAIT)
    relay.stop()
    relay.close()
    assert len(failed) == 1
    assert "host b" in failed[0].what
    assert bytes(memory.words.map) == before
    memory.close()


def test_the_loss_of_a_host_is_told(hosts: Callable[..., Hosts], connected: Open) -> None:
    made = hosts("a", "b")
    made.relays["b"].stop()
    transport = made.relays["b"]._transport
    transport.close()
    limit = time.monotonic() + WAIT
    while not made.failed:
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert "host b" in made.failed[0].what
