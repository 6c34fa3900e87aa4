"""The crew: one host's workers, led by its agent. The master's own host has one like every other.

Workers run by themselves up to the lease. Who they are is decided by `membership`, and where they
go on after a change by `recovery`; here is the I/O of both. Where there are several hosts, the
crew comes to rest when these are regrouped, and goes on when it is told how.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from lockstep.agent import membership
from lockstep.agent.evaluation_rounds import Evaluation, Inferred
from lockstep.agent.failure_log import FailureLog
from lockstep.agent.local_host import Event, LocalHost
from lockstep.agent.membership import WorkerMembership
from lockstep.agent.observer import RunObserver
from lockstep.agent.recovery import Resumption, resume, step_in_flight
from lockstep.agent.regroup_messages import Action, HostStatus, RegroupOrder
from lockstep.agent.step_log import StepLog, Throughput
from lockstep.collectives.host_mesh import HostMesh
from lockstep.errors import NetworkError, NumericsError, WorkerLostError, from_message
from lockstep.planning.assignment import assign
from lockstep.planning.host_role import HostRole
from lockstep.planning.ownership import ownership_of
from lockstep.planning.plan import Plan
from lockstep.planning.step_phases import Phase, Stage, progress_of
from lockstep.planning.worker_messages import (
    AgentMessage,
    BatchDone,
    BatchesDone,
    Interrupted,
    LoaderLost,
    Rested,
    RunSteps,
    Scored,
    ShardCorrupted,
    Started,
    StateCorrupted,
    Stop,
    WorkerFailed,
)
from lockstep.state.control_segment import RING
from lockstep.state.snapshot import steps_between
from lockstep.system.unix_channel import Closed

TICK = 0.05
"""Seconds between two looks at the ring."""
DISMISS_SECONDS = 10.0


class WorkerGroup:
    """The workers of a host whose state is set up, from `step` on.

    `plan` has this host's number of workers. `mesh`: its place among several hosts, where its
    workers rest until the first `arrange`.
    """

    def __init__(
        self,
        host: LocalHost,
        plan: Plan,
        observer: RunObserver,
        step: int | None,
        *,
        warm_up: float = 0.0,
        mesh: HostMesh | None = None,
    ) -> None:
        """`step`: after how many steps the state is; None: it has to come from another host."""
        self.host, self.plan, self.observer, self.mesh = host, plan, observer, mesh
        self.control = host.control
        self.clock = Throughput(warm_up)
        self.history = StepLog(host, plan, observer, self.clock, step or 0)
        self.failures = FailureLog(host, self.history, observer)
        self.members = WorkerMembership(
            target=plan.workers, max_workers=plan.max_workers, held=mesh is not None
        )
        ownership = ownership_of(plan.ownership, plan.servers, plan.compression, plan.local_steps)
        self.roles = HostRole.alone(host.name, plan, ownership)
        self._has_state, self._stood = step is not None, False
        self.evaluation = Evaluation(self)
        self._idle: dict[int, int] = {}
        self._marked = step or 0
        """The last step at whose end the base is, or will be, brought up to date."""
        self._set_words(step or 0)
        if step is not None:
            host.base.take(step)

    @property
    def step(self) -> int:
        """How many steps are committed and recorded."""
        return self.history.step

    # Membership: what happened goes to the pure machine, what it commands is carried out.

    def decide(self, event: membership.Event) -> None:
        """Let the machine decide on an event and carry its commands out."""
        self.members, commands, reason = membership.decide(self.members, event)
        for command in commands:
            match command:
                case membership.SpawnWorker(worker_id):
                    pid = self.host.spawn(worker_id).pid
                    self.observer.event("spawned", worker=worker_id, pid=pid, reason=reason)
                case membership.RaiseEpoch():
                    self.control.raise_epoch()
                    self.observer.event("regroup", epoch=self.control.epoch, reason=reason)
                case membership.DismissWorker(worker_id):
                    self.tell(worker_id, Stop())
                    self.observer.event("dismissed", worker=worker_id, reason=reason)
                case membership.FormGroup(worker_ids):
                    self._form(worker_ids, reason)
                case membership.GiveUp():
                    raise WorkerLostError(
                        f"workers cannot be started: {reason}",
                        fix="look for the out-of-memory killer, or for native code that crashes",
                    )

    def _form(self, worker_ids: tuple[int, ...], reason: str) -> None:
        """Put the state in order and send the new members on. Everybody rests."""
        members = self.history.worker_ids or worker_ids
        resumption = resume(
            [self.control.progress(worker_id) for worker_id in members],
            [self.control.updating(worker_id) for worker_id in members],
            self.control.shard_done.tolist(),
            self.control.snapshot_step,
            len(worker_ids),
            self.roles.shards,
        )
        if resumption.back is None:
            self.history.mend(resumption.step)
        elif self.roles.several:  # alone no use: others have gone on, or are needed for it
            self.decide(membership.RegroupDeferred())
            self._torn(f"its state is torn: {reason}")
            return
        else:
            self._roll_back()
        self._send_on(worker_ids, {*members, *worker_ids}, resumption, reason)

    def _send_on(
        self, worker_ids: tuple[int, ...], all_seats: set[int], resumption: Resumption, reason: str
    ) -> None:
        control, roles = self.control, self.roles
        with control.seating:
            for worker_id in all_seats:
                control.set_updating(worker_id, -1)
                control.ask(worker_id, 0)
            for worker_id in worker_ids:
                control.set_progress(worker_id, progress_of(resumption.step, Phase.STARTED))
                control.forget_shard(worker_id)
            self.history.worker_ids = worker_ids
        self._idle.clear()
        self.clock.rest()
        self.grant()
        self.failures.regrouped(resumption)
        self.observer.event("formed", seats=worker_ids, step=resumption.step, reason=reason)
        refresh = resumption.back is None and not roles.parted and not self.observer.busy()
        for rank, worker_id in enumerate(worker_ids):
            assignment = assign(
                roles,
                worker_ids,
                rank,
                epoch=control.epoch,
                step=resumption.step,
                todo=resumption.todo[rank],
                refresh=refresh,
                loaders=self.failures.loaders_live,
            )
            self.tell(worker_id, assignment)

    def _roll_back(self) -> None:
        """Put the base in the place of a state that is torn."""
        self.history.drain()
        self.host.base.roll_back()
        self.control.snapshot_due[:] = 0  # later steps' marks may lie in the places of those redone

    def tell(self, worker_id: int, message: AgentMessage) -> None:
        """Send a message; to one that has just died, in vain: its death will be heard of."""
        with contextlib.suppress(Closed):
            self.host.worker_ids[worker_id].channel.send(message)

    # The hosts: come to rest, say how the state is, go on as ordered.

    def _torn(self, why: str) -> None:
        """Have the hosts regrouped. Overridden where there are several."""

    def hold(self, generation: int) -> None:
        """Come to rest and stay there: the hosts are being regrouped."""
        assert self.mesh is not None
        self._address = self.mesh.open(generation)
        self._stood = False
        self.decide(membership.PauseRequested())

    def stands(self) -> HostStatus | None:
        """How this host stands, once everybody rests; each generation once."""
        if self.mesh is None or self._stood or not self.mesh.generation:
            return None
        if not (self.members.held and self.members.complete):
            return None
        self._stood = True
        words = [self.control.progress(worker_id) for worker_id in self.history.worker_ids]
        step = step_in_flight(words) if words else self.history.step
        torn = step in [self.control.updating(worker_id) for worker_id in self.history.worker_ids]
        return HostStatus(
            whole=step if self._has_state and not torn else None,
            base=self.control.snapshot_step if torn or not self.roles.ownership.whole else None,
            address=self._address,
        )

    def arrange(self, orders: RegroupOrder) -> None:
        """Go on as ordered. If that cannot be, the station has a trouble, and everybody rests on.

        Raises:
            IntegrityError: the state that was copied is not what was sent.
        """
        assert self.mesh is not None
        mesh, name = self.mesh, self.mesh.name
        self.roles = self.roles.among(orders.workers, self.host.slot_map)
        self.history.owned = self.roles.owned
        peer = ""
        try:
            if self.roles.several:
                mesh.connect(orders.addresses)
            if orders.actions[name] == "back":
                self._roll_back()
            if orders.actions[name] == "copy":
                peer = orders.source
                self._has_state = False
                part = self.roles.needed_by(name, self.host.known_layout)
                mesh.receive_state(self.host, orders.step, peer, part)
            elif orders.source == name:
                self._send_state(orders)
        except NetworkError as error:
            mesh.trouble(mesh.generation, peer or _named(error, orders.workers), error)
            return
        self._settle(orders.step, orders.actions[name])
        mesh.start(self.host, self.roles, orders.step, lambda: self.history.worker_ids)
        self.decide(membership.ResumeRequested())

    def _send_state(self, orders: RegroupOrder) -> None:
        """Give the state to the hosts that copy it, or what each needs of it."""
        mesh, copying = self.mesh, orders.copying
        assert mesh is not None
        if self.roles.ownership.whole and copying:
            mesh.send_state(self.host, orders.step, copying)
        elif not self.roles.ownership.whole:
            for peer in copying:
                part = self.roles.needed_by(peer, self.host.known_layout)
                mesh.send_state(self.host, orders.step, [peer], part)

    def give(self, master: str) -> None:
        """Give the master this host's part of the state. Called when everybody rests."""
        assert self.mesh is not None
        try:
            part = self.roles.part_of(self.host.name, self.host.known_layout)
            self.mesh.send_state(self.host, self.step, [master], part)
        except NetworkError as error:
            self.mesh.trouble(self.mesh.generation, master, error)

    def take_parts(self, wanted: Callable[[], bool]) -> bool:
        """Get every other host's part, as long as that is wanted; whether all have come. If not,
        the station has a trouble. Called when everybody rests, with all of them asked to give.

        Raises:
            IntegrityError: what has come is not what was sent.
        """
        assert self.mesh is not None
        for name in self.roles.others:
            part = self.roles.part_of(name, self.host.known_layout)
            try:
                self.mesh.receive_state(self.host, self.step, name, part, wanted)
            except NetworkError as error:
                self.mesh.trouble(self.mesh.generation, name, error)
                return False
        return True

    def _settle(self, step: int, action: Action) -> None:
        """The state is that after `step` steps: let everything else say so, too."""
        control, mine = self.control, self.roles.shards
        if action == "keep":
            for shard in range(self.plan.shards):
                if shard not in mine:  # its slot gets what another host has computed
                    control.shard_done[shard] = -1
        else:
            control.shard_done[:] = -1
        control.ready[:] = 0
        self.history.settle(step)
        self._set_words(step)
        if action == "copy":
            control.snapshot_due[:] = 0  # the workers make the base when they begin
        self._has_state = True

    def _set_words(self, step: int) -> None:
        """Let nobody be in the middle of anything: everybody is at the start of a step."""
        self.control.set_exchanged(step, Stage.STARTED)
        for worker_id in range(self.plan.max_workers):
            self.control.set_progress(worker_id, progress_of(step, Phase.STARTED))
            self.control.set_updating(worker_id, -1)
            self.control.ask(worker_id, 0)

    # The lease: workers may run every step below it.

    def _lease(self) -> int:
        """How far the workers may run."""
        raise NotImplementedError

    def grant(self) -> None:
        """Extend the lease as far as it may go, and wake the workers that rest below it.

        Not while everybody is to rest: a lone worker meets nobody at a barrier who could tell it.
        """
        if self.members.regrouping:
            return
        lease = max(self.control.lease, self._lease())
        self._mark(self.control.lease, lease, self.clock.rate / self.plan.batch_size)
        self.control.lease = lease
        woken = [worker_id for worker_id, step in self._idle.items() if step < lease]
        for worker_id in woken:
            del self._idle[worker_id]
            self.tell(worker_id, RunSteps())
        if woken:
            self.decide(membership.WorkersResumed())

    def _mark(self, first: int, last: int, steps_per_second: float) -> None:
        """Mark the steps of a new lease at whose end the base is brought up to date: none while a
        checkpoint is being written from it."""
        every = steps_between(self.host.base.nbytes, self.plan.workers, steps_per_second)
        for step in range(first, last):
            due = (
                step - self._marked >= every and not self.roles.parted and not self.observer.busy()
            )
            self.control.snapshot_due[step % RING] = due
            if due:
                self._marked = step

    # What the workers say.

    def listen(self) -> None:
        """Hear what the workers say, and who has died, for up to a tick."""
        for event in self.host.events(TICK):
            self._heard(event)
        self.failures.looked = time.monotonic()

    def watch(self) -> None:
        """See that everybody who has something to do gets on with it."""
        self.failures.kill_stalled(set(self.members.having(membership.Status.WORKING)))
        self.failures.kill_absent(self.members.status)

    def _heard(self, event: Event) -> None:
        worker_id, message = event.worker_id, event.message
        if message is None:
            self.failures.died(worker_id, self.members.status.get(worker_id.number), self.snapshot)
            self._idle.pop(worker_id.number, None)
            self.decide(membership.WorkerDied(worker_id.number))
            return
        number = worker_id.number
        match message:
            case Started():
                self._admit(number, message.probe)
                self.decide(membership.WorkerReady(number))
            case Rested():
                self._idle[number] = message.step
                self.decide(membership.WorkerRested(number))
            case Interrupted() | BatchesDone():
                self.decide(membership.WorkerRested(number))
            case BatchDone():
                result = json.loads(message.result)
                self.evaluation.batch_done(message.round, message.batch, result)
            case Scored():
                self.evaluation.scored(message)
            case ShardCorrupted():
                self.observer.event(
                    "corrupt",
                    host=self.host.name,
                    worker=message.worker_id,
                    step=message.step,
                    shard=message.shard,
                )
            case StateCorrupted():
                self.observer.event(
                    "corrupt",
                    host=self.host.name,
                    worker=message.worker_id,
                    step=message.step,
                    tensor=message.tensor,
                    elements=list(message.elements),
                )
                self.failures.spoilt(message)
                self.decide(membership.WorkerCorrupted(number))
            case LoaderLost():
                self.failures.lost_loader(worker_id)
            case WorkerFailed():
                error = from_message(message.error)
                raise self.failures.raised(error, message.step, self.snapshot)

    # Held-out data. With other hosts, the master shares the batches out.

    def share_out(self, what: Inferred, number: int, batches: Sequence[int]) -> list[int]:
        """Give other hosts their part of the batches, under the number of a round; the rest."""
        return list(batches)

    def gather(self) -> None:
        """Wait for what other hosts have made of theirs."""

    def _admit(self, number: int, probe: str) -> None:
        expected = self.host.facts["probe"]
        if probe != expected and self.plan.threads == 1:
            raise NumericsError(
                f"worker {number} does not compute the same bits as the nursery",
                expected=f"probe {expected}",
                found=f"probe {probe}",
                fix="run with --numerics portable",
            )
        pid = self.host.worker_ids[number].pid
        self.observer.event("joined", host=self.host.name, worker=number, pid=pid, probe=probe)

    def snapshot(self) -> tuple[int, memoryview]:
        """The base, brought up to date, and after how many steps it is. Called when every worker
        rests. Where no host has the whole state the base stays as it is."""
        if self.roles.parted:
            return self.control.snapshot_step, self.host.base.view
        self.observer.settle()
        return self.step, self.host.base.take(self.step)

    def await_rest(self) -> None:
        """Wait until the members in force all rest at the stop."""
        while self.members.regrouping or not self.members.all_rest:
            self.listen()
            self.watch()

    # The end.

    def dismiss(self) -> None:
        """Send the workers home and see them go."""
        for worker_id in self.members.status:
            self.tell(worker_id, Stop())
        for _ in self._until_gone(time.monotonic() + DISMISS_SECONDS):
            pass

    def _until_gone(self, limit: float) -> Iterator[None]:
        while any(worker_id.alive for worker_id in self.host.worker_ids.values()):
            left = limit - time.monotonic()
            if left <= 0:
                return  # the host kills whoever is left
            for _ in self.host.events(left):
                yield


def _named(error: NetworkError, names: Mapping[str, int] | Sequence[str]) -> str:
    """The host that an error is about."""
    return next((name for name in names if name in error.what), "")
