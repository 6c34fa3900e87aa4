"""Node agents: which nodes of a Ray cluster have an agent, and which get another one. Pure.

A node has one agent from when it is first seen until it is gone. An agent that dies, or loses its
master, is followed by another one while the node is there, a bounded number of times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lockstep.cluster.daemon.restart_policy import is_death
from lockstep.errors import LockstepError

MOST_AGENTS = 3
"""How many agents a node gets, one after the other."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine, as Ray describes it."""

    id: str
    """Ray's name for it; a node that has died never comes back under the same."""
    name: str
    """Its host name."""
    address: str
    """Where others reach it."""
    workers: int
    """How many CPUs Ray has on it."""


@dataclass(frozen=True, kw_only=True)
class NodeAgent:
    """A node, and the agents that it has had."""

    node: Node
    agents: int = 1
    """How many it has been given."""
    vacant: bool = False
    """Whether it is to get another one."""


NodeAgents = Mapping[str, NodeAgent]
"""By the id of the node."""


@dataclass(frozen=True)
class Reserve:
    """Have Ray keep the CPUs of these nodes for their agents."""

    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Start:
    """Start an agent on a node."""

    node: Node


@dataclass(frozen=True)
class Forget:
    """A node is gone, and with it its agent."""

    id: str


Command = Reserve | Start | Forget


def look(node_agents: NodeAgents, nodes: Iterable[Node]) -> tuple[NodeAgents, tuple[Command, ...]]:
    """The state when these nodes are there, and what to do."""
    there = {node.id: node for node in nodes}
    gone = tuple(Forget(each) for each in node_agents if each not in there)
    new = tuple(node for node in there.values() if node.id not in node_agents)
    vacant = tuple(
        node_agent.node
        for node_agent in node_agents.values()
        if node_agent.vacant and node_agent.node.id in there
    )
    found = {each: node_agent for each, node_agent in node_agents.items() if each in there}
    found |= {node.id: NodeAgent(node=node) for node in new}
    for node in vacant:
        found[node.id] = replace(found[node.id], agents=found[node.id].agents + 1, vacant=False)
    reserve = (Reserve(new),) if new else ()
    return found, (*gone, *reserve, *(Start(node) for node in (*new, *vacant)))


def end(node_agents: NodeAgents, node: str, error: LockstepError | None) -> tuple[NodeAgents, str]:
    """The state when the agent of a node has ended, and what follows, in words.

    One that was refused, or whose job failed, would fare no better a second time.
    """
    node_agent = node_agents[node]
    if not is_death(error):
        return node_agents, "it is not started again"
    if node_agent.agents >= MOST_AGENTS:
        return node_agents, f"it is not started again: that was the last of {MOST_AGENTS} times"
    follows = (
        f"another one is started while Ray has the node: {node_agent.agents + 1} of {MOST_AGENTS}"
    )
    return {**node_agents, node: replace(node_agent, vacant=True)}, follows
