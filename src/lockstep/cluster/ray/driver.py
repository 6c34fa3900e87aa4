"""Ray driver: of a job on Ray, the process `python -m lockstep.cluster.ray.driver`.

It is apart from the master because Ray leaves threads, descriptors and a signal handler in the
process that it was used in, ends that process when the head node is lost, and unpickles what comes
from the cluster. With the master it speaks, on a socket, as `up` does (see `cluster_messages`):

    DriverReady  the address of this node  ->
    OpenJob      a job                    <-
    JobOpened    the hosts that there are  ->
    HostReport   what became of a host     ->

When the master closes the socket, or dies, it ends everything. When it dies itself, Ray ends the
actors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.agent.job_offer import JobOffer
from lockstep.cluster.daemon import agent_processes as agents
from lockstep.cluster.daemon.cluster_messages import (
    TO_DRIVER,
    CloseJob,
    DriverReady,
    JobOpened,
    JobState,
    OpenJob,
    RequestFailed,
    host_report,
)
from lockstep.cluster.ray import node_agents as node_agents
from lockstep.cluster.ray.actor import RayAgent
from lockstep.cluster.ray.node_agents import Forget, Node, NodeAgents, Reserve, Start
from lockstep.cluster.ray.placement_groups import NodeBundles
from lockstep.cluster.state_folder import clean_name
from lockstep.errors import (
    IdentityError,
    LockstepError,
    NetworkError,
    WorkerLostError,
)
from lockstep.net.certificate_authority import Authority
from lockstep.net.certificates import RUN_SECONDS, name_in
from lockstep.system.messages import ErrorMessage, Message, encode
from lockstep.system.unix_socket import MessageSocket

LOOK_SECONDS = 1.0
"""How often Ray is asked for nodes and for agents that have ended."""
ROOM_SECONDS = 180.0
"""When it is said that Ray has found no room for an agent."""
LEAVE_SECONDS = 3.0
"""How long agents may take to end by themselves, when their job has."""
END_SECONDS = agents.END_SECONDS + 2.0
"""How long they may take when they are told to, after which nobody clears up for them."""
EXIT_SECONDS = 12.0
"""When this process ends in any case, once the master is gone."""


@dataclass(kw_only=True)
class Agent:
    """An actor of ours, and what it was asked."""

    host: str
    """The name in its certificate."""
    actor: Any
    call: Any
    """The answer that is waited for: a request for a certificate, then why the agent ended."""
    serving: bool = False
    asked_at: float
    """In seconds of `time.monotonic`; infinite once it was said that there is no room."""


class Driver:
    """Keeps an agent on every node but this one. Used by one thread."""

    def __init__(self, ray: Any, master: MessageSocket, authority: Authority) -> None:
        self._ray, self._master, self._authority = ray, master, authority
        self._own: str = ray.get_runtime_context().get_node_id()
        self._offer: JobOffer | None = None
        self._node_agents: NodeAgents = {}
        self._agents: dict[str, Agent] = {}
        """By the id of the node."""
        self._bundles = NodeBundles(ray)

    def run(self) -> bool:
        """Do as the master says, until it is gone; returns whether it has closed the job before."""
        (here,) = (each for each in self._ray.nodes() if each["NodeID"] == self._own)
        self._say(DriverReady(address=here["NodeManagerAddress"]))
        try:
            while True:
                try:
                    message = self._master.receive()
                except TimeoutError:
                    pass
                except OSError:
                    return False
                else:
                    match message:
                        case OpenJob(offer=offer):
                            self._open(offer)
                        case CloseJob():
                            return True
                        case _:
                            return False
                if self._offer is not None:
                    self._look(self._offer)
        finally:
            self._end()

    def _say(self, message: Message) -> None:
        with contextlib.suppress(OSError):  # that the master is gone is heard
            self._master.send(message)

    def _open(self, offer: JobOffer) -> None:
        self._offer = offer
        self._look(offer)
        hosts = [agent.host for agent in self._agents.values()]
        self._say(JobOpened(job=offer.job, hosts=hosts))

    def _look(self, offer: JobOffer) -> None:
        """Compare the agents that there are with the nodes, and see who has answered."""
        self._node_agents, commands = node_agents.look(self._node_agents, self._nodes())
        for command in commands:
            match command:
                case Reserve(nodes):
                    self._bundles.reserve(nodes)
                case Start(node):
                    self._start(node)
                case Forget(node):
                    self._forget(node)
        calls = {agent.call: node for node, agent in self._agents.items()}
        if calls:
            answered, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0)
            for call in answered:
                self._answered(calls[call], offer)
        self._complain()

    def _complain(self) -> None:
        """Say, once, which agents Ray has found no room for."""
        for agent in self._agents.values():
            if not agent.serving and time.monotonic() - agent.asked_at > ROOM_SECONDS:
                agent.asked_at = float("inf")
                self._tell(
                    agent.host,
                    "failed",
                    f"Ray has not started an actor there within {ROOM_SECONDS:.0f} s; it takes "
                    "part as soon as that is so. See which CPUs are in use: ray status",
                )

    def _nodes(self) -> Iterator[Node]:
        """The nodes that are there, without this one and those that have no CPU for Ray."""
        for each in self._ray.nodes():
            workers = int(each["Resources"].get("CPU", 0)) if each["Alive"] else 0
            if workers and each["NodeID"] != self._own:
                yield Node(
                    id=each["NodeID"],
                    name=each["NodeManagerHostname"],
                    address=each["NodeManagerAddress"],
                    workers=workers,
                )

    def _start(self, node: Node) -> None:
        """Have Ray start an actor in a node's bundle, as soon as there is room."""
        host = f"{clean_name(node.name)}-{secrets.token_hex(3)}"
        actor = (
            self._ray.remote(RayAgent)
            .options(
                name=host,
                num_cpus=node.workers,
                max_concurrency=2,
                scheduling_strategy=self._bundles.strategy(node.id),
            )
            .remote()
        )
        self._agents[node.id] = Agent(
            host=host, actor=actor, call=actor.request.remote(host), asked_at=time.monotonic()
        )

    def _forget(self, node: str) -> None:
        agent = self._agents.pop(node, None)
        if agent is not None:
            self._tell(agent.host, "failed", "Ray has lost the node")
            self._ray.kill(agent.actor)
        self._bundles.forget(node)

    def _answered(self, node: str, offer: JobOffer) -> None:
        """An actor has answered, or is dead."""
        agent = self._agents[node]
        try:
            answer = self._ray.get(agent.call, timeout=LOOK_SECONDS)
            if not agent.serving:
                self._enrol(agent, self._node_agents[node].node, answer, offer)
                return
            error = agents.ERROR.decode(answer).error() if answer else None
        except LockstepError as refused:
            error = refused
        except self._ray.exceptions.RayError as died:
            error = WorkerLostError("its actor died", found=str(died).strip()[:500])
        self._ended(node, error)

    def _enrol(self, agent: Agent, node: Node, request: bytes, offer: JobOffer) -> None:
        """Give an actor the certificate that it asks for, and its order.

        Raises:
            LockstepError: it asks for another one than it should.
        """
        certificate = self._authority.sign(request, seconds=RUN_SECONDS)
        if (name := name_in(certificate)) != agent.host:
            raise IdentityError(
                "an actor has asked for another name", expected=agent.host, found=name
            )
        agent.call = agent.actor.serve.remote(
            certificate, self._authority.certificate, encode(offer), node.workers, node.address
        )
        agent.serving = True
        self._tell(agent.host, "taken", "")

    def _ended(self, node: str, error: LockstepError | None) -> None:
        agent = self._agents.pop(node)
        self._ray.kill(agent.actor)
        self._node_agents, follows = node_agents.end(self._node_agents, node, error)
        if error is not None:
            self._tell(agent.host, "failed", f"{error}\n  {follows}")

    def _tell(self, host: str, state: JobState, why: str) -> None:
        job = "" if self._offer is None else self._offer.job
        self._say(host_report(host, job, state, why))

    def _end(self) -> None:
        """End the agents; a moment is theirs, to say goodbye, and another one to clear up."""
        calls = [agent.call for agent in self._agents.values() if agent.serving]
        self._await(calls, LEAVE_SECONDS)
        self._await(
            [*calls, *(agent.actor.end.remote() for agent in self._agents.values())], END_SECONDS
        )
        for agent in self._agents.values():
            self._ray.kill(agent.actor)
        self._bundles.close()

    def _await(self, calls: Sequence[Any], seconds: float) -> None:
        """Wait for all of these answers, but no longer than that."""
        if calls:
            self._ray.wait(calls, num_returns=len(calls), timeout=seconds)


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module `ray`, connected to a cluster that is there.

    Raises:
        NetworkError: it cannot be reached from here, or is lost later.
    """
    import ray
    import ray.util.scheduling_strategies

    try:
        ray.init(
            address=address,
            log_to_driver=False,
            configure_logging=False,
            logging_level=logging.ERROR,
        )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise NetworkError(
            f"the Ray cluster {address!a} cannot be reached",
            expected="a cluster that runs, and that this machine is a node of",
            found=str(error).strip()[:500],
            fix="on this machine: ray start --address ADDRESS, or ray start --head; see ray status",
        ) from error
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise NetworkError(
            f"the Ray cluster {address!a} is lost", found=str(error).strip()[:500]
        ) from error
    finally:
        ray.shutdown()


def end_with(master: socket.socket) -> None:
    """End this process soon after the master is gone, even if Ray does not answer."""
    poll = select.poll()
    poll.register(master, select.POLLRDHUP)
    poll.poll()
    timer = threading.Timer(EXIT_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()


def main() -> int:
    """Serve the master at the other end of a socket; returns the process's exit code."""
    descriptor, folder, address = sys.argv[1:]
    os.dup2(2, 1)  # Ray prints
    sock = socket.socket(fileno=int(descriptor))
    sock.settimeout(LOOK_SECONDS)
    threading.Thread(target=end_with, args=(sock,), daemon=True).start()
    messages = MessageSocket(sock, TO_DRIVER)
    try:
        with connected(address) as ray:
            closed = Driver(ray, messages, Authority(Path(folder))).run()
        if not closed:  # it cannot clear up itself
            shutil.rmtree(Path(folder).parent, ignore_errors=True)
    except LockstepError as error:
        with contextlib.suppress(OSError):
            messages.send(RequestFailed(error=ErrorMessage.of(error)))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
