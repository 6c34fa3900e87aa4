"""Board relay: carries a team's boards over to the other hosts of the team.

Each host has all members' lines and buffers in memory of its own. Here, threads of the agent watch
the lines of the host's own workers and send what these announce and show; others write what comes
from other hosts into their lines. Workers see no difference: they wait for words in shared memory.

What one member shows goes in the order in which it was shown, and a stamp before what is shown
under it. A member shows at most two things that somebody has not seen yet (see `board`), and these
are what its two buffers hold.
"""

from __future__ import annotations

import itertools
import math
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from lockstep.errors import NetworkError, ProtocolError
from lockstep.net.frames import LIMITS, Kind
from lockstep.net.transport import Key, Pending, Transport, await_transfer
from lockstep.planning.teams import board_line
from lockstep.slices.board_memory import (
    CONTENT,
    COUNT,
    EPOCH_MASK,
    EPOCH_SHIFT,
    LINE,
    NOTHING_LEFT,
    ORIGIN,
    SHARD,
    SHOWN,
    SIGN_OFFSET,
    STAMP,
    BoardMemory,
    Buffer,
    check_shown,
)
from lockstep.system import futex

HEAD = struct.Struct("=5q")
"""Stamp, shard, count (0: nothing is shown with it), which buffer, and bytes that follow."""
MOST_SHARDS, MOST_SHOWN = 1 << 31, 1 << 40
"""What another host's numbers stay below."""
NAP = 0.02
LOOK_SECONDS = 0.1
"""Between two looks at whether the relay has been stopped."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """A change of a line, as it goes to another host."""

    stamp: int
    shard: int
    count: int = 0
    """Of the exchange; 0: nothing is shown."""
    place: int = 0
    """In which of the two buffers it belongs."""
    shown: bytes = b""

    def head(self) -> bytes:
        return HEAD.pack(self.stamp, self.shard, self.count, self.place, len(self.shown))


class Line:
    """One member's line and buffers, in this host's memory."""

    def __init__(self, memory: BoardMemory, number: int) -> None:
        whole = memoryview(memory.words.map)[number * LINE :][:LINE]
        self._words, self._signs = whole.cast("q"), whole.cast("i")
        self._sign_address = np.frombuffer(whole, np.uint8).ctypes.data + SIGN_OFFSET
        self.buffers = [Buffer(fd) for fd in memory.fds[number]]

    @property
    def shown(self) -> int:
        """How many things this member has ever shown."""
        return self._words[SHOWN]

    def await_change(self, seen: int) -> None:
        futex.wait(self._sign_address, seen, NAP)

    @property
    def sign(self) -> int:
        return self._signs[SIGN_OFFSET // 4]

    def stamp_and_shard(self) -> tuple[int, int]:
        """The stamp, and the shard that was announced before it."""
        return self._words[STAMP], self._words[SHARD]

    def find(self, number: int) -> Update | None:
        """What was shown as this number; None: it is gone, since nobody needs it."""
        for place, buffer in enumerate(self.buffers):
            origin = ORIGIN.unpack_from(buffer.map, CONTENT.size)
            if origin[0] != number:
                continue
            _, used, _ = CONTENT.unpack_from(buffer.map)
            buffer.see(used)
            shown = buffer.map[:used]
            if ORIGIN.unpack_from(buffer.map, CONTENT.size) == origin:  # nobody wrote meanwhile
                return Update(stamp=origin[1], shard=0, count=origin[2], place=place, shown=shown)
        return None

    def close(self) -> None:
        """Let go of the memory."""
        self._words.release()
        self._signs.release()
        for buffer in self.buffers:
            buffer.close()

    # What has come from another host.

    def room(self, place: int, nbytes: int) -> memoryview:
        """Where something that is shown belongs."""
        buffer = self.buffers[place]
        buffer.grow(nbytes)
        return memoryview(buffer.map)[:nbytes]

    def apply(self, update: Update) -> None:
        """Write the words. The count is 0 while the stamp changes."""
        if self._words[STAMP] != update.stamp:
            self._words[COUNT] = 0
            self._words[SHARD] = update.shard
            self._words[STAMP] = update.stamp
        if update.count:
            self._words[COUNT] = update.count
        self._signs[SIGN_OFFSET // 4] = (self.sign + 1) & 0x7FFFFFFF
        futex.wake(self._sign_address)


class BoardRelay:
    """One host's, in one generation of hosts."""

    def __init__(
        self,
        memory: BoardMemory,
        transport: Transport,
        hosts: Sequence[str],
        own: str,
        *,
        teams: int,
        max_workers: int,
        generation: int,
        failed: Callable[[NetworkError], None],
    ) -> None:
        """Make it, without a running thread yet.

        Args:
            memory: of all members' boards, as this host sees them.
            transport: connects with the other hosts.
            hosts: of the team, in the order of its members.
            own: this host.
            teams: how many workers of each host have partners.
            max_workers: of this host.
            generation: of the hosts; stamps of others do not count.
            failed: told, once, why it has ended.
        """
        self._transport, self._epoch = transport, generation & EPOCH_MASK
        self._others = [name for name in hosts if name != own]
        self._failed, self._stop = failed, threading.Event()
        self._own_lines: list[Line] = []
        """By rank."""
        self._sent: list[int] = []
        """By rank, the number of the last thing that was sent."""
        self._told = [-1] * teams
        """By rank, the last stamp that was."""
        self._sending = threading.Condition()
        self._lines: list[Line] = []
        works: list[Callable[[], None]] = []
        for rank, (position, name) in itertools.product(range(teams), enumerate(hosts)):
            line = Line(memory, board_line(position, rank, max_workers))
            self._lines.append(line)
            if name == own:
                self._own_lines.append(line)
                self._sent.append(line.shown)
                works.append(partial(self._give, rank))
            else:
                works.append(partial(self._take, name, rank, line))
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name="lockstep board", daemon=True)
            for work in works
        ]

    def start(self) -> None:
        """Carry on from here. Called when all workers rest."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Call it off, and wait for the threads' end."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Let go of the memory, when nobody flushes any more."""
        for line in self._lines:
            line.close()

    def flush(self) -> None:
        """Wait until all that this host's workers have announced and shown is on its way: what its
        others send then may be looked for only when that is there, and would hold it up."""
        with self._sending:
            while not self._stop.is_set() and any(map(self._has_news, range(len(self._own_lines)))):
                self._sending.wait(LOOK_SECONDS)

    def _has_news(self, rank: int) -> bool:
        line = self._own_lines[rank]
        return self._sent[rank] < line.shown or self._told[rank] != line.stamp_and_shard()[0]

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except NetworkError as error:  # also that nothing is waited for any more
            self._fail(error)
        except Exception as error:  # such as no memory: the hosts are regrouped, and it is said why
            self._fail(NetworkError(f"a team's board cannot be carried over: {error!r}"))

    def _fail(self, error: NetworkError) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self._failed(error)

    # This host's members.

    def _give(self, rank: int) -> None:
        """Send what one of this host's workers announces and shows."""
        line, sequence = self._own_lines[rank], itertools.count()
        while not self._stop.is_set():
            seen = line.sign
            stamp, shard = line.stamp_and_shard()
            known = stamp == self._told[rank]
            updates = [] if known else [Update(stamp=stamp, shard=shard)]
            done, shown = self._sent[rank], line.shown  # after the stamp: none is left out
            for number in range(max(done, shown - len(line.buffers)) + 1, shown + 1):
                update = line.find(number)
                if update is not None and update.stamp > stamp:
                    break  # its stamp goes before it
                done = number
                updates += [] if update is None else [update]
            updates.sort(key=lambda update: (update.stamp, update.count))
            for update in updates:
                if update.stamp >> EPOCH_SHIFT == self._epoch:
                    self._send(rank, next(sequence), update)
            with self._sending:
                self._sent[rank], self._told[rank] = done, stamp
                self._sending.notify_all()
            line.await_change(seen)

    def _send(self, rank: int, sequence: int, update: Update) -> None:
        for name in self._others:
            head, body = _keys(rank, sequence)
            self._transport.send(name, head, memoryview(update.head()))
            if update.shown:
                self._transport.send(name, body, memoryview(update.shown))

    # Other hosts' members.

    def _take(self, name: str, rank: int, line: Line) -> None:
        """Write what comes of another host's worker into its line."""
        head = bytearray(HEAD.size)
        for sequence in itertools.count():
            head_key, body_key = _keys(rank, sequence)
            self._await(self._transport.expect(name, head_key, memoryview(head)))
            stamp, shard, count, place, nbytes = HEAD.unpack(head)
            update = Update(stamp=stamp, shard=shard, count=count, place=place)
            self._check(name, update, nbytes)
            if nbytes:
                room = line.room(place, nbytes)
                self._await(self._transport.expect(name, body_key, room))
                check_shown(name, room)
            line.apply(update)

    def _check(self, name: str, update: Update, nbytes: int) -> None:
        possible = (
            update.stamp >> EPOCH_SHIFT == self._epoch
            and NOTHING_LEFT <= update.shard < MOST_SHARDS
            and 0 <= update.count < MOST_SHOWN
            and update.place in (0, 1)
            and 0 <= nbytes <= LIMITS[Kind.SHOWN]
            and (update.count > 0) == (nbytes > 0)
        )
        if not possible:
            raise ProtocolError(
                f"host {name} sends what no member of a team can show",
                expected=f"a stamp of generation {self._epoch}, and numbers within their bounds",
                found=f"{update}, {nbytes:,} bytes",
            )

    def _await(self, slip: Pending) -> None:
        """Wait for what comes next of a member, which may be busy for long: that it lives is for
        others to see."""
        await_transfer(slip, math.inf, lambda: not self._stop.is_set())


def _keys(rank: int, sequence: int) -> tuple[Key, Key]:
    """The names of an update's head, and of what is shown with it."""
    return Key(Kind.SHOWN, sequence, 2 * rank), Key(Kind.SHOWN, sequence, 2 * rank + 1)
