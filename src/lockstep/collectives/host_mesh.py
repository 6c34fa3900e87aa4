"""A host's place among the others: its connections of one generation, its exchanger, its state.

Every generation of hosts has connections of its own, so that nothing that was sent in an earlier
one can be taken for something else.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from blake3 import blake3

from lockstep.agent.local_host import LocalHost
from lockstep.collectives.exchange_plan import ExchangePlan
from lockstep.collectives.exchange_thread import ExchangeThread
from lockstep.errors import IntegrityError, NetworkError
from lockstep.net.frames import Kind
from lockstep.net.identity import Identity
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import Key, Pending, Report, await_transfer
from lockstep.planning.byte_ranges import ByteRange
from lockstep.planning.host_role import HostRole
from lockstep.planning.slot_map import cut
from lockstep.state.control_segment import RING
from lockstep.system import machine

CONNECT_SECONDS = 5.0
STATE_SECONDS = 600.0
"""The longest that a copy of the state may take."""
DIGEST_BYTES = 32
PIECE_BYTES = 4 << 20
"""Pieces in which a state is sent: each is digested while the next is on its way."""
LOSSES, NORM, DIGEST = 1 << 20, (1 << 20) + 1, (1 << 20) + 2
"""Tags of what goes with a state, behind those of its pieces."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Why this host cannot go on under an arrangement."""

    generation: int
    peer: str
    why: str


class HostMesh:
    """Made by an agent for one job. All but `troubles` is for the agent's main thread."""

    def __init__(
        self,
        identity: Identity,
        address: str,
        job: str,
        report: Report,
        wake: Callable[[], None],
        silence: float,
    ) -> None:
        """`wake` is called, from any thread, when there is a trouble to be looked at. `silence`:
        after so many seconds without a word a machine is lost."""
        self._silence = silence
        self.identity, self.address, self.job = identity, address, job
        self._report, self._wake = report, wake
        self.generation = 0
        self.troubles: deque[Trouble] = deque()
        self._mesh: TcpTransport | None = None
        self._exchange_thread: ExchangeThread | None = None

    @property
    def name(self) -> str:
        return self.identity.node

    def open(self, generation: int) -> tuple[str, int]:
        """Leave the last generation and listen for this one; where."""
        self.close()
        self.generation = generation
        self._mesh = TcpTransport(
            self.identity,
            job=f"{self.job}/{generation}",
            facts={},  # were compared when the hosts met the master
            host=self.address,
            silence=self._silence,
            report=self._report,
            reports_ends=False,  # an exchange that fails tells of one; others are a regrouping's
        )
        return self._mesh.address

    def connect(self, addresses: Mapping[str, tuple[str, int]]) -> None:
        """Connect with all hosts of this generation.

        Raises:
            NetworkError: one of them cannot be reached.
        """
        assert self._mesh is not None
        others = {name: at for name, at in addresses.items() if name != self.name}
        self._mesh.connect(others, CONNECT_SECONDS)

    def start(
        self,
        host: LocalHost,
        roles: HostRole,
        step: int,
        worker_ids: Callable[[], Sequence[int]],
    ) -> None:
        """Exchange from this step on. Called when everybody rests."""
        if not roles.several:
            return
        assert self._mesh is not None
        generation = self.generation

        def failed(error: NetworkError) -> None:
            peer = next((n for n in addresses if f"host {n}" in error.what), "")
            self.trouble(generation, peer, error)

        addresses = roles.others
        plan = roles.plan
        exchange_plan = ExchangePlan(
            host.control,
            memoryview(host.slots.map),
            memoryview(host.state.map),
            host.slot_map,
            host.known_layout,
            roles.arrangement,
            roles.duties,
            self.name,
        )
        self._exchange_thread = ExchangeThread(
            exchange_plan,
            self._mesh,
            worker_ids,
            failed,
            clip=plan.sum_limit is not None,
            spare=machine.cores() > plan.workers * plan.threads,
        )
        self._exchange_thread.start(step)

    def trouble(self, generation: int, peer: str, error: NetworkError) -> None:
        """Take note of why this host cannot go on. May be called from any thread."""
        why = error.what + (f": {error.found}" if error.found else "")
        self.troubles.append(Trouble(generation=generation, peer=peer, why=why))
        self._wake()

    def close(self) -> None:
        """Leave the generation: whatever is under way is dropped, and memory is free again."""
        if self._exchange_thread is not None:
            self._exchange_thread.stop()
            self._exchange_thread = None
        if self._mesh is not None:
            for peer in self._mesh.peers:
                self._mesh.drop(peer, "the hosts are being regrouped")
            self._mesh.close()
            self._mesh = None

    # The state, from one host to another. Called when everybody rests on both.

    def send_state(
        self,
        host: LocalHost,
        step: int,
        peers: Sequence[str],
        part: Sequence[ByteRange] | None = None,
    ) -> None:
        """Give the state after `step` committed steps, or a part of it, to these hosts."""
        assert self._mesh is not None
        mesh, digest = self._mesh, blake3()
        slips: list[Pending] = []

        def send(tag: int, view: memoryview) -> None:
            slips.extend(mesh.send(peer, Key(Kind.STATE, step, tag), view) for peer in peers)

        for tag, view in _pieces(host, step, part):
            send(tag, view)
            digest.update(view)  # while it is sent
        send(DIGEST, memoryview(digest.digest(DIGEST_BYTES)))
        for slip in slips:
            slip.wait(STATE_SECONDS)

    def receive_state(
        self,
        host: LocalHost,
        step: int,
        source: str,
        part: Sequence[ByteRange] | None = None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Get the state, or a part of it, from a host, in place of this one's.

        `wanted` is asked again and again whether it still is.

        Raises:
            NetworkError: it has not come whole. This host then has none.
            IntegrityError: its bytes are not those that were sent.
        """
        assert self._mesh is not None
        told = bytearray(DIGEST_BYTES)
        items = list(_pieces(host, step, part))
        slips = [
            self._mesh.expect(source, Key(Kind.STATE, step, tag), view)
            for tag, view in [*items, (DIGEST, memoryview(told))]
        ]
        digest = blake3()
        for slip, (_, view) in zip(slips, items, strict=False):
            await_transfer(slip, STATE_SECONDS, wanted)
            digest.update(view)  # while more comes
        await_transfer(slips[-1], STATE_SECONDS, wanted)
        found = digest.digest(DIGEST_BYTES)
        if found != told:
            raise IntegrityError(
                f"the state from host {source} has changed on its way",
                expected=f"digest {told.hex()[:16]}…",
                found=f"digest {found.hex()[:16]}…",
                fix="look for faulty memory on both hosts",
            )


def _pieces(
    host: LocalHost, step: int, part: Sequence[ByteRange] | None
) -> Iterator[tuple[int, memoryview]]:
    """The state, and what is known of the step before, or a part of the state; by tag."""
    state = memoryview(host.state.map)
    ranges = [ByteRange(offset=0, nbytes=host.state.nbytes)] if part is None else part
    pieces = itertools.chain.from_iterable(cut(run, PIECE_BYTES) for run in ranges)
    for tag, piece in enumerate(pieces):
        yield tag, state[piece.offset : piece.offset + piece.nbytes]
    if part is not None:
        return
    place = (step - 1) % RING
    yield LOSSES, host.control.losses[place].data.cast("B")
    yield NORM, host.control.total_norms[place : place + 1].data.cast("B")
