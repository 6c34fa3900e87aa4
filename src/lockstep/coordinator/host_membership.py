"""Host membership: which hosts there are, and what becomes of a step when one dies or joins.

    decide(hosts, event) -> (hosts, commands, reason)

A pure function, as `membership` is for a host's workers. Hosts are regrouped in three moves: all
come to rest (`PauseHosts`, which begins a *generation*), each says what state it has
(`HostPaused`), and when all have, they are told who computes what, from which step on, and who
copies the state from whom (`ResumeHosts`). A death on the way begins another generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lockstep.agent.regroup_messages import Action, HostStatus

MOST_TROUBLES = 2
"""In how many generations, without a step in between, hosts may have trouble before one has to go.
"""
MOST_OF_MASTER = 5
"""The same of what the master's own host alone has; then the run ends."""


@dataclass(frozen=True, kw_only=True)
class HostMember:
    """A host of the job."""

    workers: int
    status: HostStatus | None = None
    """As it was said in this generation."""


@dataclass(frozen=True, kw_only=True)
class HostMembership:
    """The hosts of a job, and whether they are being regrouped."""

    master: str
    """The host that coordinates: it is never given up on."""
    members: Mapping[str, HostMember] = field(default_factory=dict)
    generation: int = 0
    regrouping: bool = False
    whole: bool = True
    """Whether each host has the whole state. If not, each has a part of it that it alone updates,
    and the master's snapshot is the one state that is whole."""
    resumed: frozenset[str] = frozenset()
    """The hosts that were told to go on, last."""
    troubles: Mapping[frozenset[str], frozenset[int]] = field(default_factory=dict)
    """In which generations since the last step two hosts have lost each other, or one host had a
    trouble of its own."""
    began: int = 0
    """The generation that was told to go on, last: what is said of it still counts."""
    hurried: bool = False
    """Whether the run is to stop: nobody gets a second chance."""


# Events.


@dataclass(frozen=True)
class HostReady:
    """A host is ready to take part, with so many workers."""

    name: str
    workers: int


@dataclass(frozen=True)
class HostPaused:
    """A host rests, and says what state it has."""

    name: str
    generation: int
    status: HostStatus


@dataclass(frozen=True)
class HostLost:
    """A host is gone, or has said nothing for too long."""

    name: str
    why: str
    closed: bool = False
    """Whether it is gone: another one may be connected under its name already."""


@dataclass(frozen=True)
class ExchangeFailed:
    """A host cannot go on: by a trouble of its own (no `peer`), or it has lost another host."""

    name: str
    generation: int
    peer: str
    why: str
    awaited: frozenset[str] = frozenset()
    """Whom the master's own exchange waits for at this time, as a second opinion."""


@dataclass(frozen=True)
class StopWanted:
    """The run is to stop soon."""


@dataclass(frozen=True)
class StepsCommitted:
    """A step was committed."""


Event = HostReady | HostPaused | HostLost | ExchangeFailed | StopWanted | StepsCommitted


# Commands.


@dataclass(frozen=True)
class PauseHosts:
    """Tell every host to come to rest; a new generation begins."""

    generation: int


@dataclass(frozen=True, kw_only=True)
class ResumeHosts:
    """Tell every host who computes what, and where to go on."""

    generation: int
    step: int
    workers: Mapping[str, int]
    """By host, in the order in which they share out the shards."""
    actions: Mapping[str, Action]
    source: str
    """Whom the state is copied from."""


@dataclass(frozen=True)
class AbandonHost:
    """Have nothing to do with this host any more."""

    name: str
    why: str
    drop: bool = True
    """Whether it may be connected still."""


@dataclass(frozen=True)
class GiveUp:
    """End the run: the master's own host cannot exchange anything."""

    why: str


Command = PauseHosts | ResumeHosts | AbandonHost | GiveUp
Decision = tuple[HostMembership, tuple[Command, ...], str]


def decide(hosts: HostMembership, event: Event) -> Decision:
    """The next state, what to do, and why."""
    match event:
        case HostReady(name, workers):
            members = {**hosts.members, name: HostMember(workers=workers)}
            return _pause(replace(hosts, members=members), f"host {name} is there")
        case HostPaused(name, generation, status):
            if generation != hosts.generation or name not in hosts.members:
                return hosts, (), f"host {name} speaks of another generation"
            workers = status.workers or hosts.members[name].workers
            member = replace(hosts.members[name], status=status, workers=workers)
            hosts = replace(hosts, members={**hosts.members, name: member})
            return _resume_if_all_rest(hosts, f"host {name} rests")
        case HostLost(name, why, closed):
            return _lost(hosts, name, why, drop=not closed)
        case ExchangeFailed(name, generation):
            known = generation in {hosts.generation, hosts.began or hosts.generation}
            if not known or name not in hosts.members:
                return hosts, (), f"host {name} speaks of another generation"
            return _exchange_failed(hosts, event)
        case StopWanted():
            return replace(hosts, hurried=True), (), "the run is to stop"
        case StepsCommitted():
            return (
                replace(hosts, troubles={}) if hosts.troubles else hosts,
                (),
                "a step was made",
            )


def _pause(hosts: HostMembership, reason: str) -> Decision:
    members = {name: replace(member, status=None) for name, member in hosts.members.items()}
    hosts = replace(hosts, members=members, generation=hosts.generation + 1, regrouping=True)
    return hosts, (PauseHosts(hosts.generation),), reason


def _lost(hosts: HostMembership, name: str, why: str, *, drop: bool = True) -> Decision:
    if name not in hosts.members:
        return hosts, (), f"host {name} was given up before"
    members = {other: member for other, member in hosts.members.items() if other != name}
    troubles = {pair: each for pair, each in hosts.troubles.items() if name not in pair}
    hosts = replace(hosts, members=members, troubles=troubles)
    hosts, commands, reason = _pause(hosts, f"host {name} is lost: {why}")
    return hosts, (AbandonHost(name, why, drop), *commands), reason


def _exchange_failed(hosts: HostMembership, event: ExchangeFailed) -> Decision:
    """Regroup the hosts, without the one that is most likely to blame if it goes on and on."""
    name, peer, why = event.name, event.peer, event.why
    late = event.generation < hosts.generation
    if peer not in hosts.members:
        if peer and late:
            return hosts, (), f"host {name} speaks of host {peer}, which is lost"
        peer = ""
    pair = frozenset((name, peer or name))
    generations = hosts.troubles.get(pair, frozenset()) | {event.generation}
    hosts = replace(hosts, troubles={**hosts.troubles, pair: generations})
    gone = _to_blame(hosts, event)
    if gone == hosts.master:
        return hosts, (GiveUp(why),), f"host {name} cannot exchange anything: {why}"
    if gone:
        both = f"hosts {name} and {peer} cannot reach each other: " if peer else ""
        return _lost(hosts, gone, both + why)
    reason = f"host {name} has lost host {peer}: {why}" if peer else f"host {name}: {why}"
    return (hosts, (), reason) if late else _pause(hosts, reason)


def _to_blame(hosts: HostMembership, event: ExchangeFailed) -> str:
    """Who has to go for the troubles there are, if somebody has: of those who had some in too many
    generations the one that is in most pairs; of several, whom the master waits for itself, and
    else who says so alone of another. Never the master, but for troubles of its own."""
    pairs: dict[str, list[frozenset[int]]] = {}
    for pair, generations in hosts.troubles.items():
        for name in pair:
            pairs.setdefault(name, []).append(generations)
    most = 1 if hosts.hurried else MOST_TROUBLES
    own = hosts.troubles.get(frozenset((hosts.master,)), ())
    if len(own) >= MOST_OF_MASTER:
        return hosts.master
    often = {
        name: (len(found), sum(map(len, found)))
        for name, found in pairs.items()
        if name != hosts.master and len(frozenset().union(*found)) >= most
    }
    worst = [name for name, rank in often.items() if rank == max(often.values())]
    if len(worst) < 2:
        return "".join(worst)
    awaited = [name for name in worst if name in event.awaited]
    if event.peer in awaited or (hosts.master in (event.name, event.peer)):
        return event.peer if event.peer in worst else worst[0]
    return awaited[0] if awaited else event.name if event.name in worst else worst[0]


def _resume_if_all_rest(hosts: HostMembership, reason: str) -> Decision:
    statuses = {name: member.status for name, member in hosts.members.items()}
    known = {name: status for name, status in statuses.items() if status is not None}
    if not hosts.regrouping or len(known) < len(statuses):
        return hosts, (), reason
    if hosts.whole:
        step, source, actions = settle(known, hosts.master)
    else:
        step, source, actions = settle_parts(known, hosts.master, hosts.resumed)
    names = in_order(known, hosts.master)
    command = ResumeHosts(
        generation=hosts.generation,
        step=step,
        workers={name: hosts.members[name].workers for name in names},
        actions=actions,
        source=source,
    )
    hosts = replace(hosts, regrouping=False, resumed=frozenset(names), began=hosts.generation)
    return hosts, (command,), f"{reason}, as all do"


def in_order(names: Iterable[str], master: str) -> list[str]:
    """The order in which hosts share out the shards: the master's first."""
    return [master, *sorted(name for name in names if name != master)]


def settle(statuses: Mapping[str, HostStatus], master: str) -> tuple[int, str, dict[str, Action]]:
    """Where all hosts go on: from the newest state that somebody has whole.

    Whole states are at most a step apart, since nobody updates before everybody has computed. A
    snapshot counts only where no whole state is as new: then every host was torn in the same step.

    Returns the step, the host that has that state, and what each host does to get it.
    """
    step = max(
        value
        for status in statuses.values()
        for value in (status.whole, status.snapshot)
        if value is not None
    )
    actions: dict[str, Action] = {}
    for name, status in statuses.items():
        if status.whole == step:
            actions[name] = "keep"
        elif status.snapshot == step:
            actions[name] = "back"
        else:
            actions[name] = "copy"
    able = [name for name, action in actions.items() if action != "copy"]
    kept = [name for name in able if actions[name] == "keep"]
    source = master if master in able else (kept or able)[0]
    return step, source, actions


def settle_parts(
    statuses: Mapping[str, HostStatus], master: str, resumed: frozenset[str]
) -> tuple[int, str, dict[str, Action]]:
    """Where all hosts go on, where each has a part of the state: as they are, if they are the same
    as before and nobody is torn or a step behind; else from the master's snapshot, which is whole.

    Returns the step, the master, and what each host does.
    """
    steps = {status.whole for status in statuses.values()}
    if resumed == statuses.keys() and len(steps) == 1 and None not in steps:
        (step,) = steps
        assert step is not None
        return step, master, dict.fromkeys(statuses, "keep")
    snapshot = statuses[master].snapshot
    assert snapshot is not None
    return snapshot, master, {name: "back" if name == master else "copy" for name in statuses}
