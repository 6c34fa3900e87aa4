"""Followed part: a host's part in a job whose master is on another host.

The workers run as far as the master's lease; when all rest, the host does what the master has asked
for: held-out batches, or to give its part of the state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lockstep.agent import membership
from lockstep.agent.answer_chunks import in_chunks
from lockstep.agent.evaluation_rounds import EvaluationRounds, OwnShare
from lockstep.agent.host_messages import (
    EventForwarded,
    ExchangeTrouble,
    HostPaused,
    HostReady,
    InferBatches,
    LeaseExtended,
    MetricEvaluated,
    PauseWorkers,
    Recovered,
    ResumeWorkers,
    SendState,
    StepRecorded,
)
from lockstep.agent.host_regroup import HostRegroup
from lockstep.agent.local_host import LocalHost
from lockstep.agent.observer import NullObserver
from lockstep.agent.worker_group import WorkerGroup
from lockstep.collectives.host_mesh import HostMesh
from lockstep.net.control_link import ControlLink
from lockstep.planning.metric_decisions import Told
from lockstep.planning.plan import Plan
from lockstep.state.host_memory import HostMemory
from lockstep.system.messages import Message


class Forwarder(NullObserver):
    """Keeps nothing, and forwards to the master what people may want to know."""

    def __init__(self, link: ControlLink, master: str) -> None:
        self._link, self._master = link, master

    def event(self, name: str, **fields: object) -> None:
        self._link.tell(self._master, EventForwarded(name=name, fields=fields))


class FollowedPart:
    """Runs a worker group as a master on another host orders."""

    def __init__(
        self,
        host: LocalHost,
        memory: HostMemory,
        plan: Plan,
        link: ControlLink,
        mesh: HostMesh,
        master: str,
        moved: Callable[[], object],
    ) -> None:
        """`moved` is called once, when this host has taken part in a step."""
        self._link, self._mesh, self._master, self._moved = link, mesh, master, moved
        self._leased = 0
        self._untold: deque[Told] = deque()
        """What the task's schedule is to be told when all rest: no later step begins before."""
        self.group = WorkerGroup(
            host, memory, plan, Forwarder(link, master), None, lease=self._lease, held=True
        )
        self._regroup = HostRegroup(self.group, mesh)
        self._rounds = EvaluationRounds(self.group, OwnShare(lambda: bool(mesh.troubles)))
        self._ready = self._has_moved = False
        self._asked: deque[InferBatches | SendState] = deque()
        """What is to be done when all rest."""
        self.group.decide(membership.GroupStarted())

    def _lease(self) -> int:
        return min([self._leased, *(step for step, _ in self._untold)])

    def tick(self) -> None:
        """Lead the workers for a moment, and report."""
        group = self.group
        group.listen()
        group.step_log.drain()
        self._report()
        self._tell_metrics()
        self._do_asked()
        group.grant()
        group.watch()

    def do(self, message: Message) -> None:
        """Carry out an order of the master's, or note it until all rest."""
        match message:
            case PauseWorkers(generation=generation):
                self._asked = deque(each for each in self._asked if not isinstance(each, SendState))
                self._regroup.pause(generation)
            case ResumeWorkers(order=order, lease=lease, told=told):
                self._leased = lease
                self.group.told[:] = told
                self._untold.clear()
                self._regroup.resume(order)
            case LeaseExtended(step=step):
                self._leased = step
                self.group.grant()
            case MetricEvaluated(told=told):
                self._untold.append(told)
            case InferBatches() | SendState():
                self._asked.append(message)

    def _report(self) -> None:
        """Tell the master what has happened since the last report."""
        step_log, link, master = self.group.step_log, self._link, self._master
        if not self._has_moved and step_log.committed_at:
            self._has_moved = True
            self._moved()
        for step, digest in step_log.marks.items():
            link.tell(master, StepRecorded(step=step, digest=digest))
        step_log.marks.clear()
        recovered = self.group.failure_log.recovered(step_log.committed_at)
        if recovered:
            link.tell(master, Recovered(recoveries=recovered))
        self._regroup.report_corruption()
        while self._mesh.troubles:
            trouble = self._mesh.troubles.popleft()
            link.tell(
                master,
                ExchangeTrouble(generation=trouble.generation, other=trouble.peer, why=trouble.why),
            )
        if not self._ready and self.group.members.complete:
            self._ready = True  # only now: nobody is held up while workers start
            link.tell(master, HostReady(workers=self.group.plan.workers))
        status = self._regroup.status()
        if status is not None:
            generation = self._mesh.generation
            link.tell(master, HostPaused(generation=generation, status=status))

    def _tell_metrics(self) -> None:
        """Tell the workers what the task's schedule waits for. The others of the job may be ahead:
        this host's may still be on the last step before."""
        while self._untold and self._rests_at(self._untold[0][0]):
            self.group.tell_metric(self._untold.popleft())

    def _do_asked(self) -> None:
        """Do what was asked for, if everybody rests where it was to be done. What the master has
        not waited for is dropped."""
        while self._asked and self._asked[0].step < self.group.step:
            self._asked.popleft()
        while self._asked and self._rests_at(self._asked[0].step):
            asked = self._asked.popleft()
            if isinstance(asked, SendState):
                self._regroup.give_part(self._master)
            else:
                self._infer(asked)

    def _rests_at(self, step: int) -> bool:
        """Whether everybody rests, with the state after so many steps."""
        group = self.group
        return group.at_rest and len(group.idle) == len(group.members.formed) and group.step == step

    def _infer(self, asked: InferBatches) -> None:
        """Do this host's part of a round of held-out batches, and send what comes of each."""
        if self.group.role.together:  # the master's workers answer
            self._rounds.take_part(asked.what, asked.batches)
            return
        results = self._rounds.divide(asked.what, asked.batches)
        for batch, result in zip(asked.batches, results, strict=True):
            for chunk in in_chunks(asked.round, batch, result):
                self._link.tell(self._master, chunk)
