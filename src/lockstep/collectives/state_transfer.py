"""State transfer: the state, or a part of it, from one host to another.

Called when everybody rests on both hosts. Each piece is digested while the next is on its way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from blake3 import blake3

from lockstep.errors import IntegrityError
from lockstep.net.frames import Kind
from lockstep.net.transport import Key, Pending, Transport, await_transfer
from lockstep.planning.byte_ranges import ByteRange
from lockstep.planning.slot_map import cut
from lockstep.state.control_segment import RING
from lockstep.state.host_memory import HostMemory

STATE_SECONDS = 600.0
"""The longest that a copy of the state may take."""
DIGEST_BYTES = 32
PIECE_BYTES = 4 << 20
LOSSES, NORM, DIGEST = 1 << 20, (1 << 20) + 1, (1 << 20) + 2
"""Tags of what goes with a state, behind those of its pieces."""


@dataclass(frozen=True, kw_only=True)
class StateTransfer:
    """Sends and receives the state in a host's memory over the mesh of one generation."""

    transport: Transport
    memory: HostMemory

    def send(
        self, step: int, peers: Sequence[str], part: Sequence[ByteRange] | None = None
    ) -> None:
        """Give the state after `step` committed steps, or a part of it, to these hosts."""
        digest = blake3()
        transfers: list[Pending] = []

        def send(tag: int, view: memoryview) -> None:
            key = Key(Kind.STATE, step, tag)
            transfers.extend(self.transport.send(peer, key, view) for peer in peers)

        for tag, view in self._pieces(step, part):
            send(tag, view)
            digest.update(view)  # while it is sent
        send(DIGEST, memoryview(digest.digest(DIGEST_BYTES)))
        for transfer in transfers:
            transfer.wait(STATE_SECONDS)

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
        digest = blake3()
        for transfer, (_, view) in zip(transfers, items, strict=False):
            await_transfer(transfer, STATE_SECONDS, wanted)
            digest.update(view)  # while more comes
        await_transfer(transfers[-1], STATE_SECONDS, wanted)
        found = digest.digest(DIGEST_BYTES)
        if found != sent:
            raise IntegrityError(
                f"the state from host {donor} has changed on its way",
                expected=f"digest {sent.hex()[:16]}…",
                found=f"digest {found.hex()[:16]}…",
                fix="look for faulty memory on both hosts",
            )

    def _pieces(
        self, step: int, part: Sequence[ByteRange] | None
    ) -> Iterator[tuple[int, memoryview]]:
        """The state, and what is known of the step before, or a part of the state; by tag."""
        state, control = memoryview(self.memory.state.map), self.memory.control
        whole = ByteRange(offset=0, nbytes=self.memory.state.nbytes)
        ranges = [whole] if part is None else part
        pieces = itertools.chain.from_iterable(cut(run, PIECE_BYTES) for run in ranges)
        for tag, piece in enumerate(pieces):
            yield tag, state[piece.offset : piece.offset + piece.nbytes]
        if part is not None:
            return
        place = (step - 1) % RING
        yield LOSSES, control.losses[place].data.cast("B")
        yield NORM, control.total_norms[place : place + 1].data.cast("B")
