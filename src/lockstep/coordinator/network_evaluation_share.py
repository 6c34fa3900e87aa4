"""Network evaluation share: held-out batches divided among hosts, and their answers gathered."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from lockstep.agent.answer_chunks import AnswerAssembler, check_result
from lockstep.agent.evaluation_rounds import Inferred
from lockstep.agent.host_messages import BatchChunk, InferBatches
from lockstep.agent.worker_group import WorkerGroup
from lockstep.coordinator.host_inbox import HostInbox, Overdue
from lockstep.errors import ProtocolError
from lockstep.net.control_link import ControlLink
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import Heard
from lockstep.planning.data_partition import held_out_batches
from lockstep.planning.shard_placement import share_batches

OF_OWN_TIME = 10.0
"""How many times as long as the master's own part another host's next answer may take."""


class NetworkEvaluationShare:
    """The master's end of a round of held-out batches, while all hosts rest."""

    def __init__(
        self,
        group: WorkerGroup,
        inbox: HostInbox,
        link: ControlLink,
        transport: TcpTransport,
        workers: Callable[[], Mapping[str, int]],
        observe: Callable[[Heard], bool],
        check_ended: Callable[[str], None],
        lost: Callable[[str, str], None],
        limit: Callable[[], float],
        troubled: Callable[[], bool],
    ) -> None:
        """Divide batches for a worker group, the master's own.

        Args:
            group: gets the answers.
            inbox: what hosts say.
            link: where they are asked.
            transport: drops a host whose answers are none.
            workers: the hosts in force, with their numbers of workers.
            observe: deals with a message that is no answer, if it can be dealt with at once.
            check_ended: raises, or has the group decide, if the host of this name has ended.
            lost: gives up a host, and says why.
            limit: how many seconds one may wait for another host's next answer.
            troubled: whether the master's own host cannot go on with others.
        """
        self._troubled = troubled
        self._lost, self._limit = lost, limit
        self._shared_at = self._took = 0.0
        """When the last round was shared out, and how long the master's own part of it took."""
        self._overdue = Overdue()
        self._group, self._inbox, self._link, self._transport = group, inbox, link, transport
        self._workers, self._observe, self._check_ended = workers, observe, check_ended
        self._data_parts = group.plan.holdings
        self._answers = AnswerAssembler()
        self._what: Inferred = "evaluate"
        """What is asked for in this round."""
        self._asked: dict[str, set[int]] = {}
        """By host, the batches that it has not answered yet."""

    def share_out(self, what: Inferred, number: int, batches: Sequence[int]) -> list[int]:
        """Give the other hosts their part of a round, by who has the data or by their numbers of
        workers; the part of the master's own."""
        master = self._group.host.name
        if self._group.role.together:  # all compute each batch, and the master's workers answer
            shares = {name: list(batches) for name in self._workers()}
        elif self._data_parts:
            owned = held_out_batches(self._data_parts, self._group.plan.eval_batch_size)
            shares = {name: [n for n in batches if n in owned[name]] for name in owned}
        else:
            shares = share_batches(batches, dict(self._workers()), master)
        rest = shares.pop(master)
        self._what = what
        self._answers.begin(number)
        awaited = {} if self._group.role.together else shares
        self._asked = {name: set(batches) for name, batches in awaited.items()}
        self._shared_at = time.monotonic()
        for name, part in shares.items():
            step = self._group.step
            self._link.tell(
                name, InferBatches(what=what, round=number, step=step, batches=list(part))
            )
        return rest

    def disturbed(self) -> bool:
        return self._troubled() or self._inbox.disturbs(self._group.role.others, self._observe)

    def gather(self) -> None:
        """Wait for the answers. Who is lost, or has to be regrouped, is not waited for."""
        self._took = time.monotonic() - self._shared_at
        while waiting := [name for name, batches in self._asked.items() if batches]:
            self._inbox.keep(0.2, self._handled)
            late = self._late(waiting)
            for name in waiting:
                if name in late and self._data_parts:
                    self._lost(name, late[name])
                elif name in late:
                    self._asked[name] = set()
                elif self._data_parts:  # nobody else can do them: it is waited for while it lives
                    self._check_ended(name)
                elif self._inbox.has_said(name) or self._inbox.is_silent(name):
                    self._asked[name] = set()

    def _late(self, waiting: Sequence[str]) -> dict[str, str]:
        """The hosts that have not answered for too long, though they are alive, and why."""
        limit = max(self._limit(), OF_OWN_TIME * self._took)
        return {
            name: f"it has sent no result of held-out data for {seconds:.1f} s"
            for name, seconds in self._overdue.look(waiting).items()
            if seconds > limit
        }

    def _handled(self, heard: Heard) -> bool:
        message = heard.message
        if not isinstance(message, BatchChunk):
            return self._observe(heard)
        if message.batch not in self._asked.get(heard.peer, ()):
            return True  # it has not been asked for this one, or has answered
        self._overdue.moved(heard.peer)
        try:
            answer = self._answers.add(heard.peer, message)
            if answer is not None:
                check_result(self._what, heard.peer, message.batch, answer.result)
        except ProtocolError as error:
            self._transport.drop(heard.peer, f"it has sent no answer: {error.what}")
            return True
        if answer is not None:
            self._asked.get(heard.peer, set()).discard(answer.batch)
            self._group.answers.append(answer)
        return True
