"""The fleet: which hosts there are, and what becomes of a step when one dies or joins.

    decide(fleet, event) -> (fleet, commands, reason)

A pure function, as `membership` is for a host's workers. Hosts are regrouped in three moves: all
are told to come to rest (`Hold`, which begins a *generation*), each says in what state it stands
(`Stood`), and when all have, they are told who computes what, from which step on, and who copies
the state from whom (`Arrange`). A death on the way begins another generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lockstep.agent.regroup_messages import Action, HostStatus

MOST_TROUBLES = 2
"""How often two hosts may lose each other, without a step in between, before one has to go."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A host of the fleet."""

    workers: int
    standing: HostStatus | None = None
    """As it was said in this generation."""


@dataclass(frozen=True, kw_only=True)
class HostMembership:
    """The state of the fleet."""

    master: str
    """The host that coordinates: it is never given up on."""
    members: Mapping[str, Member] = field(default_factory=dict)
    generation: int = 0
    regrouping: bool = False
    whole: bool = True
    """Whether each host has the whole state. If not, each has a part of it that it alone updates,
    and the master's base is the one state that is whole."""
    arranged: frozenset[str] = frozenset()
    """The hosts that were told to go on, last."""
    troubles: Mapping[frozenset[str], int] = field(default_factory=dict)
    """How often two hosts have lost each other since the last step."""


# Events.


@dataclass(frozen=True)
class Present:
    """A host is ready to take part, with so many workers."""

    name: str
    workers: int


@dataclass(frozen=True)
class Stood:
    """A host rests, and says how it stands."""

    name: str
    generation: int
    standing: HostStatus


@dataclass(frozen=True)
class Lost:
    """A host is gone, or has said nothing for too long."""

    name: str
    why: str
    closed: bool = False
    """Whether it is gone: another one may be connected under its name already."""


@dataclass(frozen=True)
class Trouble:
    """A host cannot go on: its state is torn (`peer` is empty), or it has lost another host."""

    name: str
    generation: int
    peer: str
    why: str


@dataclass(frozen=True)
class Moved:
    """A step was committed."""


Event = Present | Stood | Lost | Trouble | Moved


# Commands.


@dataclass(frozen=True)
class Hold:
    """Tell every host to come to rest; a new generation begins."""

    generation: int


@dataclass(frozen=True, kw_only=True)
class Arrange:
    """Tell every host who computes what, and where to go on."""

    generation: int
    step: int
    workers: Mapping[str, int]
    """By host, in the order in which they share out the shards."""
    actions: Mapping[str, Action]
    source: str
    """Whom the state is copied from."""


@dataclass(frozen=True)
class Abandon:
    """Have nothing to do with this host any more."""

    name: str
    why: str
    drop: bool = True
    """Whether it may be connected still."""


Command = Hold | Arrange | Abandon
Decision = tuple[HostMembership, tuple[Command, ...], str]


def decide(fleet: HostMembership, event: Event) -> Decision:
    """The next state, what to do, and why."""
    match event:
        case Present(name, workers):
            members = {**fleet.members, name: Member(workers=workers)}
            return _hold(replace(fleet, members=members), f"host {name} is there")
        case Stood(name, generation, standing):
            if generation != fleet.generation or name not in fleet.members:
                return fleet, (), f"host {name} speaks of another generation"
            member = replace(fleet.members[name], standing=standing)
            fleet = replace(fleet, members={**fleet.members, name: member})
            return _arrange_if_all_stand(fleet, f"host {name} rests")
        case Lost(name, why, closed):
            return _lost(fleet, name, why, drop=not closed)
        case Trouble(name, generation, peer, why):
            if generation != fleet.generation or name not in fleet.members:
                return fleet, (), f"host {name} speaks of another generation"
            return _trouble(fleet, name, peer, why)
        case Moved():
            return replace(fleet, troubles={}) if fleet.troubles else fleet, (), "a step was made"


def _hold(fleet: HostMembership, reason: str) -> Decision:
    members = {name: replace(member, standing=None) for name, member in fleet.members.items()}
    fleet = replace(fleet, members=members, generation=fleet.generation + 1, regrouping=True)
    return fleet, (Hold(fleet.generation),), reason


def _lost(fleet: HostMembership, name: str, why: str, *, drop: bool = True) -> Decision:
    if name not in fleet.members:
        return fleet, (), f"host {name} was given up before"
    members = {other: member for other, member in fleet.members.items() if other != name}
    fleet, commands, reason = _hold(replace(fleet, members=members), f"host {name} is lost: {why}")
    return fleet, (Abandon(name, why, drop), *commands), reason


def _trouble(fleet: HostMembership, name: str, peer: str, why: str) -> Decision:
    if peer not in fleet.members:
        return _hold(fleet, f"host {name}: {why}")
    pair = frozenset((name, peer))
    count = fleet.troubles.get(pair, 0) + 1
    if count >= MOST_TROUBLES:
        gone = name if peer == fleet.master else peer
        return _lost(fleet, gone, f"hosts {name} and {peer} cannot reach each other: {why}")
    fleet = replace(fleet, troubles={**fleet.troubles, pair: count})
    return _hold(fleet, f"host {name} has lost host {peer}: {why}")


def _arrange_if_all_stand(fleet: HostMembership, reason: str) -> Decision:
    standings = {name: member.standing for name, member in fleet.members.items()}
    known = {name: standing for name, standing in standings.items() if standing is not None}
    if not fleet.regrouping or len(known) < len(standings):
        return fleet, (), reason
    if fleet.whole:
        step, source, actions = settle(known, fleet.master)
    else:
        step, source, actions = settle_parts(known, fleet.master, fleet.arranged)
    names = in_order(known, fleet.master)
    command = Arrange(
        generation=fleet.generation,
        step=step,
        workers={name: fleet.members[name].workers for name in names},
        actions=actions,
        source=source,
    )
    fleet = replace(fleet, regrouping=False, arranged=frozenset(names))
    return fleet, (command,), f"{reason}, as all do"


def in_order(names: Iterable[str], master: str) -> list[str]:
    """The order in which hosts share out the shards: the master's first."""
    return [master, *sorted(name for name in names if name != master)]


def settle(standings: Mapping[str, HostStatus], master: str) -> tuple[int, str, dict[str, Action]]:
    """Where all hosts go on: from the newest state that somebody has whole.

    Whole states are at most a step apart, since nobody updates before everybody has computed. A
    base counts only where no whole state is as new: then every host was torn in the same step.

    Returns the step, the host that has that state, and what each host does to get it.
    """
    step = max(
        value
        for standing in standings.values()
        for value in (standing.whole, standing.base)
        if value is not None
    )
    actions: dict[str, Action] = {}
    for name, standing in standings.items():
        if standing.whole == step:
            actions[name] = "keep"
        elif standing.base == step:
            actions[name] = "back"
        else:
            actions[name] = "copy"
    able = [name for name, action in actions.items() if action != "copy"]
    kept = [name for name in able if actions[name] == "keep"]
    source = master if master in able else (kept or able)[0]
    return step, source, actions


def settle_parts(
    standings: Mapping[str, HostStatus], master: str, arranged: frozenset[str]
) -> tuple[int, str, dict[str, Action]]:
    """Where all hosts go on, where each has a part of the state: as they are, if they are the same
    as before and nobody is torn or a step behind; else from the master's base, which is whole.

    Returns the step, the master, and what each host does.
    """
    steps = {standing.whole for standing in standings.values()}
    if arranged == standings.keys() and len(steps) == 1 and None not in steps:
        (step,) = steps
        assert step is not None
        return step, master, dict.fromkeys(standings, "keep")
    base = standings[master].base
    assert base is not None
    return base, master, {name: "back" if name == master else "copy" for name in standings}
