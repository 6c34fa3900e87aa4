"""State transfer: the state, or a part of it, from one host to another.

Called when everybody rests on both hosts. Each piece is digested while the next is on its way.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from lockstep.errors import IntegrityError
from lockstep.net.frames import Kind
from lockstep.net.transport import Key, Pending, Transport, await_transfer
from lockstep.planning.byte_ranges import ByteRange
from lockstep.planning.slot_map import cut
from lockstep.state.control_segment import RING
from lockstep.state.host_memory import HostMemory
from lockstep.system.shared_memory import Segment

STATE_SECONDS, STATE_RATE = 600.0, 1e6
"""The longest that a copy of the state may take; longer, if it has come at this rate, in bytes per
second."""
PIECE_SECONDS, HURRIED_SECONDS = 60.0, 5.0
"""The longest that one piece of it may take, and when the run is to stop."""
DIGEST_BYTES = 32
PIECE_BYTES = 4 << 20
PIECES_IN_MEMORY = 8
"""Of a state on a disk, for each peer."""
OUTCOMES, NORM, DIGEST, NAMES, LOGGED = range(1 << 20, (1 << 20) + 5)
"""Tags of what goes with a state, behind those of its pieces."""


@dataclass(frozen=True, kw_only=True)
class StateTransfer:
    """Sends and receives the state in a host's memory over the mesh of one generation."""

    transport: Transport
    memory: HostMemory
    area: Segment
    """Where the state lies that is sent, or received: the state segment, or a copy of it."""
    hurried: Callable[[], bool] = lambda: False
    """Whether the run is to stop."""

    def send(
        self, step: int, peers: Sequence[str], part: Sequence[ByteRange] | None = None
    ) -> None:
        """Give the state after `step` committed steps, or a part of it, to these hosts."""
        digest, limit = blake3(), self._limit()
        under_way: deque[tuple[Pending, memoryview]] = deque()

        def send(tag: int, view: memoryview) -> None:
            key = Key(Kind.STATE, step, tag)
            under_way.extend((self.transport.send(peer, key, view), view) for peer in peers)

        def await_all_but(most: int) -> None:
            while len(under_way) > most:
                transfer, view = under_way.popleft()
                self._await(transfer, limit, lambda: True)
                self._settle(view)

        for tag, view in self._pieces(step, part):
            send(tag, view)
            digest.update(view)  # while it is sent
            if self.area.is_on_disk:
                await_all_but(PIECES_IN_MEMORY * len(peers))
        send(DIGEST, memoryview(digest.digest(DIGEST_BYTES)))
        await_all_but(0)

    def receive(
        self,
        step: int,
        donor: str,
        part: Sequence[ByteRange] | None = None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Get the state, or a part of it, from a host, in place of this one's.

        `wanted` is asked again and again whether it still is.

        Raises:
            NetworkError: it has not come whole. This host then has none.
            IntegrityError: its bytes are not those that were sent.
        """
        sent = bytearray(DIGEST_BYTES)
        items = list(self._pieces(step, part))
        transfers = [
            self.transport.expect(donor, Key(Kind.STATE, step, tag), view)
            for tag, view in [*items, (DIGEST, memoryview(sent))]
        ]
        digest, limit = blake3(), self._limit()
        for transfer, (_, view) in zip(transfers, items, strict=False):
            self._await(transfer, limit, wanted)
            digest.update(view)  # while more comes
            self._settle(view)
        self._await(transfers[-1], limit, wanted)
        found = digest.digest(DIGEST_BYTES)
        if found != sent:
            raise IntegrityError(
                f"the state from host {donor} has changed on its way",
                expected=f"digest {sent.hex()[:16]}…",
                found=f"digest {found.hex()[:16]}…",
                fix="look for faulty memory on both hosts",
            )

    def _settle(self, piece: memoryview) -> None:
        """See that a piece of a file on a disk takes no memory any more."""
        if self.area.is_on_disk and piece.nbytes > DIGEST_BYTES:
            start = np.frombuffer(self.area.map, np.uint8).ctypes.data
            self.area.settle(np.frombuffer(piece, np.uint8).ctypes.data - start, piece.nbytes)

    def _limit(self) -> float:
        """When a copy that begins now has taken too long."""
        return time.monotonic() + max(STATE_SECONDS, self.memory.state.nbytes / STATE_RATE)

    def _await(self, transfer: Pending, limit: float, wanted: Callable[[], bool]) -> None:
        """Wait for a piece. Who is alive and moves none is not waited for until the limit.

        Raises:
            NetworkError: the other host is lost, or too slow.
        """
        begun = time.monotonic()

        def goes_on() -> bool:
            most = HURRIED_SECONDS if self.hurried() else PIECE_SECONDS
            return wanted() and time.monotonic() < min(begun + most, limit)

        await_transfer(transfer, STATE_SECONDS, goes_on)

    def _pieces(
        self, step: int, part: Sequence[ByteRange] | None
    ) -> Iterator[tuple[int, memoryview]]:
        """The state, and what is known of the step before, or a part of the state; by tag."""
        state, control = memoryview(self.area.map), self.memory.control
        whole = ByteRange(offset=0, nbytes=self.memory.state.nbytes)
        ranges = [whole] if part is None else part
        pieces = itertools.chain.from_iterable(cut(run, PIECE_BYTES) for run in ranges)
        for tag, piece in enumerate(pieces):
            yield tag, state[piece.offset : piece.offset + piece.nbytes]
        if part is not None:
            return
        place = (step - 1) % RING
        yield OUTCOMES, control.outcomes[place].view(np.uint8).data
        yield NAMES, control.names.reshape(-1).data
        yield LOGGED, control.logged[place].reshape(-1).data.cast("B")
        yield NORM, control.total_norms[place : place + 1].data.cast("B")
