"""Host mesh: a host's connections to all others in one generation, and its exchange thread.

Every generation of hosts has connections of its own, so that nothing that was sent in an earlier
one can be taken for something else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lockstep.collectives.board_relay import BoardRelay
from lockstep.collectives.exchange_plan import ExchangePlan
from lockstep.collectives.exchange_thread import ExchangeThread
from lockstep.collectives.state_transfer import StateTransfer
from lockstep.errors import NetworkError
from lockstep.net.identity import Identity
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import Report
from lockstep.planning.host_role import HostRole
from lockstep.state.host_memory import HostMemory
from lockstep.system import machine
from lockstep.system.shared_memory import Segment

CONNECT_SECONDS = 5.0


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
        exchange_seconds: float | None = None,
    ) -> None:
        """`wake` is called, from any thread, when there is a trouble to be looked at. `silence`:
        after so many seconds without a word a machine is lost. `exchange_seconds`: after so many a
        host that exchanges nothing is; None: as the stall policy says."""
        self._silence, self.exchange_seconds = silence, exchange_seconds
        self.hurried: Callable[[], bool] = lambda: False
        """Whether the run is to stop, so that nobody is waited for as long as ever."""
        self.identity, self.address, self.job = identity, address, job
        self._report, self._wake = report, wake
        self.generation = 0
        self.troubles: deque[Trouble] = deque()
        self._mesh: TcpTransport | None = None
        self._exchange_thread: ExchangeThread | None = None
        self._relay: BoardRelay | None = None

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
        memory: HostMemory,
        role: HostRole,
        step: int,
        worker_ids: Callable[[], Sequence[int]],
        limit: Callable[[], float],
    ) -> None:
        """Exchange from this step on. Called when everybody rests. `limit`: how many seconds one
        may wait for another host."""
        if not role.several:
            return
        assert self._mesh is not None
        generation = self.generation

        def failed(error: NetworkError) -> None:
            peer = next((n for n in addresses if f"host {n}" in error.what), "")
            self.trouble(generation, peer, error)

        addresses = role.others
        plan = role.plan
        exchange_plan = ExchangePlan(
            memory.control,
            memoryview(memory.slots.map),
            memoryview(memory.state.map),
            memory.slot_map,
            memory.layout,
            role.placement,
            role.duties,
            self.name,
        )
        if role.together:
            assert memory.boards is not None
            self._relay = BoardRelay(
                memory.boards,
                self._mesh,
                [part.name for part in role.placement.parts],
                self.name,
                teams=role.placement.teams,
                max_workers=plan.max_workers,
                generation=generation,
                failed=failed,
            )
            self._relay.start()
        self._exchange_thread = ExchangeThread(
            exchange_plan,
            self._mesh,
            worker_ids,
            failed,
            clip=plan.sum_limit is not None,
            spare=machine.cores() > plan.workers * plan.threads,
            limit=limit,
            flush=self._relay.flush if self._relay is not None else None,
        )
        self._exchange_thread.start(step)

    @property
    def awaited(self) -> frozenset[str]:
        """The other hosts that the exchange waits for now."""
        thread = self._exchange_thread
        return frozenset() if thread is None else thread.awaited

    def trouble(self, generation: int, peer: str, error: NetworkError) -> None:
        """Take note of why this host cannot go on. May be called from any thread."""
        self.report(generation, peer, error.what + (f": {error.found}" if error.found else ""))

    def report(self, generation: int, peer: str, why: str) -> None:
        """The same, in words."""
        self.troubles.append(Trouble(generation=generation, peer=peer, why=why))
        self._wake()

    def close(self) -> None:
        """Leave the generation: whatever is under way is dropped, and memory is free again."""
        if self._relay is not None:  # first: the exchange thread may wait for it
            self._relay.stop()
        if self._exchange_thread is not None:
            self._exchange_thread.stop()
            self._exchange_thread = None
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        if self._mesh is not None:
            for peer in self._mesh.peers:
                self._mesh.drop(peer, "the hosts are being regrouped")
            self._mesh.close()
            self._mesh = None

    def transfer(self, memory: HostMemory, area: Segment | None = None) -> StateTransfer:
        """What moves state between the hosts of this generation, to or from `area`; by default the
        state segment."""
        assert self._mesh is not None
        return StateTransfer(
            transport=self._mesh, memory=memory, area=area or memory.state, hurried=self.hurried
        )
