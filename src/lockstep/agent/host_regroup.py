"""Host regroup: one host's part when the hosts of a job are regrouped.

The worker group comes to rest, the host says what state it has, and resumes as the coordinator
orders: with its own state, rolled back, or with a copy of another host's. The coordinator's own
host has one of these like every other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from lockstep.agent import membership
from lockstep.agent.regroup_messages import Action, HostStatus, RegroupOrder
from lockstep.agent.worker_group import WorkerGroup
from lockstep.collectives.host_mesh import HostMesh
from lockstep.errors import NetworkError

FIRST_STEPS = 3
"""Steps in which a host that has joined may take its time."""


class HostRegroup:
    """Pauses and resumes a worker group, and moves state between hosts while it rests."""

    def __init__(self, group: WorkerGroup, mesh: HostMesh) -> None:
        self.group, self.mesh = group, mesh
        self._address: tuple[str, int] = ("", 0)
        self._said = True
        """Whether the status of this generation has been given."""
        self._first = True
        """Whether a host has joined with this generation."""
        self._begun_at = 0
        """The step with which it began."""

    def pause(self, generation: int) -> None:
        """Come to rest and stay there: the hosts are being regrouped."""
        self._address = self.mesh.open(generation)
        self._said = False
        self.group.decide(membership.PauseRequested())

    def status(self) -> HostStatus | None:
        """What state this host has, once everybody rests; each generation once."""
        group = self.group
        if self._said or not (group.members.held and group.members.complete):
            return None
        self._said, group.corrupted = True, None
        step, updating = group.in_flight_words()
        has_snapshot = updating or not group.role.ownership.whole
        return HostStatus(
            whole=step if group.has_state and not updating else None,
            snapshot=group.control.snapshot_step if has_snapshot else None,
            workers=group.members.target if group.role.ownership.together else None,
            address=self._address,
        )

    def exchange_limit(self) -> float:
        """How many seconds one may wait for another host."""
        patience, mesh = self.group.step_log.patience, self.mesh
        first = self._first and self.group.step < self._begun_at + FIRST_STEPS
        limit = mesh.exchange_seconds or patience.exchange_limit(first=first)
        return min(limit, patience.hurried()) if mesh.hurried() else limit

    def report_corruption(self) -> None:
        """Have the hosts regrouped if the state has been found corrupted since the last call."""
        if self.group.corrupted is not None:
            why, self.group.corrupted = self.group.corrupted, None
            self.mesh.report(self.mesh.generation, "", why)

    def resume(self, order: RegroupOrder) -> None:
        """Go on as ordered. If that cannot be, the mesh has a trouble, and everybody rests on.

        Raises:
            IntegrityError: the state that was copied is not what was sent.
        """
        group, mesh, name = self.group, self.mesh, self.mesh.name
        memory, action = group.memory, order.actions[name]
        group.role = group.role.among(order.workers, memory.slot_map, mesh.generation)
        group.step_log.owned = group.role.owned_params
        peer = ""
        if group.role.ownership.together:
            self._keep_own(action)
        try:
            if group.role.several:
                mesh.connect(order.addresses)
            if action == "back":
                group.roll_back()
            if action == "copy":
                peer = order.source
                group.has_state = False
                part = group.role.needed_by(name, memory.layout)
                mesh.transfer(memory).receive(order.step, peer, part)
            elif order.source == name:
                self._send_state(order)
        except NetworkError as error:
            mesh.trouble(mesh.generation, peer or _named(error, order.workers), error)
            return
        self._settle(order.step, action)
        self._first, self._begun_at = bool(order.copying), order.step
        mesh.start(
            memory, group.role, order.step, lambda: group.step_log.worker_ids, self.exchange_limit
        )
        group.decide(membership.ResumeRequested())

    def _keep_own(self, action: Action) -> None:
        """Have memory for this host's slices, and give back that of others'. The master has these
        in its snapshot.

        Raises:
            ResourceError: its own do not fit.
        """
        role, memory = self.group.role, self.group.memory
        needed = role.needed_by(role.host, memory.layout)
        assert needed is not None
        memory.keep(needed, frozenset(role.remote_params), role.plan.shards)
        if action == "copy":  # what may be in its snapshot is of no use
            memory.copy.release(0, memory.copy.nbytes)

    def _send_state(self, order: RegroupOrder) -> None:
        """Give the state to the hosts that copy it, or what each needs of it: the snapshot is whole
        where the state need not be, and they are of the same step."""
        role, copying, memory = self.group.role, order.copying, self.group.memory
        transfer = self.mesh.transfer(memory, memory.copy if role.ownership.together else None)
        if role.ownership.whole and copying:
            transfer.send(order.step, copying)
        elif not role.ownership.whole:
            for peer in copying:
                part = role.needed_by(peer, self.group.memory.layout)
                transfer.send(order.step, [peer], part)

    def _settle(self, step: int, action: Action) -> None:
        """The state is that after `step` steps: let everything else say so, too."""
        group, control = self.group, self.group.control
        if action == "keep" and not group.role.together:
            for shard in range(group.plan.shards):
                if shard not in group.role.shards:  # its slot gets what another host has computed
                    control.shard_done[shard] = -1
        else:
            control.shard_done[:] = -1
        control.ready[:] = 0
        group.step_log.settle(step)
        group.reset_words(step)
        if action == "copy":
            control.snapshot_due[:] = 0  # the workers take the snapshot when they begin
        group.has_state = True

    # Parts of the state that one host alone has. Called when everybody rests.

    def give_part(self, master: str) -> None:
        """Give the master this host's part of the state."""
        group, mesh = self.group, self.mesh
        try:
            part = group.role.part_of(group.host.name, group.memory.layout)
            mesh.transfer(group.memory).send(group.step, [master], part)
        except NetworkError as error:
            mesh.trouble(mesh.generation, master, error)

    def take_parts(self, wanted: Callable[[], bool]) -> bool:
        """Get every other host's part, as long as that is wanted; whether all have come. If not,
        the mesh has a trouble. All have been asked to give. They go to the state, or where this
        host has no room for them there, to the snapshot.

        Raises:
            IntegrityError: what has come is not what was sent.
        """
        group, mesh, memory = self.group, self.mesh, self.group.memory
        together = group.role.together
        transfer = mesh.transfer(memory, memory.gathered if together else None)
        parts = {name: group.role.part_of(name, memory.layout) for name in group.role.others}
        for name, part in parts.items():
            try:
                transfer.receive(group.step, name, part, wanted)
            except NetworkError as error:
                mesh.trouble(mesh.generation, name, error)
                return False
        if together:
            ranges = [*itertools.chain.from_iterable(parts.values())]
            memory.snapshot.put(ranges, memory.gathered)
        return True


def _named(error: NetworkError, names: Mapping[str, int] | Sequence[str]) -> str:
    """The host that an error is about."""
    return next((name for name in names if name in error.what), "")
