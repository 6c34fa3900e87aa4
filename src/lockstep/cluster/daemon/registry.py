"""The board: which hosts there are, which jobs are open to them, and who is to be told what.

    decide(board, event) -> (board, commands)

Pure: `up` is its I/O. Whoever asks is known by a name: a host's, or that of a caller on this
machine, which begins with @.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lockstep.agent.job_offer import JobOffer
from lockstep.errors import JobError, ProtocolError, to_message

STATES = ("taken", "refused", "ended", "failed")
"""What becomes of a job on a host."""
MAX_WHY = 2000
"""Characters."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A host that takes jobs."""

    workers: int
    jobs: Mapping[str, str] = field(default_factory=dict)
    """What it last said of each job that is open."""


@dataclass(frozen=True, kw_only=True)
class Posting:
    """A job that is open to hosts."""

    offer: JobOffer
    asker: str


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The state of the cluster."""

    members: Mapping[str, Member] = field(default_factory=dict)
    postings: Mapping[str, Posting] = field(default_factory=dict)
    """By job."""


# Events.


@dataclass(frozen=True)
class Here:
    """A host takes jobs, with so many workers."""

    name: str
    workers: int


@dataclass(frozen=True)
class Gone:
    """A host, or who has asked for hosts, is not connected any more."""

    name: str


@dataclass(frozen=True)
class Open:
    """Somebody offers a job."""

    asker: str
    offer: JobOffer


@dataclass(frozen=True)
class Close:
    """Who has offered a job offers it no more."""

    asker: str
    job: str


@dataclass(frozen=True)
class Spoke:
    """A host says what became of a job."""

    name: str
    job: str
    state: str
    why: str


Event = Here | Gone | Open | Close | Spoke


@dataclass(frozen=True)
class Tell:
    """The command: send somebody a message."""

    to: str
    message: Mapping[str, Any]


Decision = tuple[Registry, tuple[Tell, ...]]


def decide(board: Registry, event: Event) -> Decision:
    """The next state, and who is to be told what."""
    match event:
        case Here(name, workers):
            members = {**board.members, name: Member(workers=workers)}
            offers = [posting.offer for posting in board.postings.values()]
            told = tuple(_offer(name, offer) for offer in offers if offer.master != name)
            return replace(board, members=members), told
        case Gone(name):
            return _gone(board, name)
        case Open(asker, offer):
            return _open(board, asker, offer)
        case Close(asker, job):
            posting = board.postings.get(job)
            return _close(board, [job] if posting and posting.asker == asker else [])
        case Spoke(name, job, state, why):
            return _spoke(board, name, job, state, why)


def _gone(board: Registry, name: str) -> Decision:
    members = {other: member for other, member in board.members.items() if other != name}
    jobs = [job for job, posting in board.postings.items() if posting.asker == name]
    told = tuple(
        _agent(posting.asker, name, job, "failed", "the host is gone")
        for job, posting in board.postings.items()
        if posting.asker != name and board.members.get(name, _NOBODY).jobs.get(job) == "taken"
    )
    board, others = _close(replace(board, members=members), jobs)
    return board, (*told, *others)


def _open(board: Registry, asker: str, offer: JobOffer) -> Decision:
    posting = board.postings.get(offer.job)
    if posting is not None and posting.asker != asker:
        error = JobError(
            f"a job {offer.job} is offered already", expected="a name that no other job has"
        )
        return board, (Tell(asker, {"op": "error", **to_message(error)}),)
    postings = {**board.postings, offer.job: Posting(offer=offer, asker=asker)}
    hosts = sorted(name for name in board.members if name != offer.master)
    opened = Tell(asker, {"op": "opened", "job": offer.job, "hosts": hosts})
    return replace(board, postings=postings), (opened, *(_offer(name, offer) for name in hosts))


def _close(board: Registry, jobs: list[str]) -> Decision:
    if not jobs:
        return board, ()
    postings = {job: posting for job, posting in board.postings.items() if job not in jobs}
    members = {
        name: replace(member, jobs={k: v for k, v in member.jobs.items() if k not in jobs})
        for name, member in board.members.items()
    }
    told = tuple(
        Tell(name, {"op": "withdraw", "job": job}) for name in sorted(members) for job in jobs
    )
    return replace(board, postings=postings, members=members), told


def _spoke(board: Registry, name: str, job: str, state: str, why: str) -> Decision:
    member, posting = board.members.get(name), board.postings.get(job)
    if member is None or posting is None:
        return board, ()  # it has crossed with the end of one of them
    member = replace(member, jobs={**member.jobs, job: state})
    board = replace(board, members={**board.members, name: member})
    return board, (_agent(posting.asker, name, job, state, why),)


def _offer(to: str, offer: JobOffer) -> Tell:
    return Tell(to, {"op": "offer", "offer": offer.to_message()})


def _agent(to: str, host: str, job: str, state: str, why: str) -> Tell:
    return Tell(to, {"op": "agent", "host": host, "job": job, "state": state, "why": why})


_NOBODY = Member(workers=0)


def parse(who: str, message: Mapping[str, Any]) -> Event:
    """What somebody's message is.

    Raises:
        ProtocolError: nothing that is known here.
    """
    match message:
        case {"op": "here", "workers": int(workers)} if workers > 0:
            return Here(who, workers)
        case {"op": "open", "offer": dict(offer)}:
            return Open(who, JobOffer.from_message(offer))
        case {"op": "close", "job": str(job)}:
            return Close(who, job)
        case {"op": "agent", "job": str(job), "state": str(state), "why": str(why)} if (
            state in STATES
        ):
            return Spoke(who, job, state, why[:MAX_WHY])
    raise ProtocolError(
        f"{who} has sent something else than a request",
        expected="here, open, close or agent",
        found=ascii(message)[:200],
    )
