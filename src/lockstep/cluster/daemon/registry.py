"""Registry: which hosts there are, which jobs are open to them, and who is to be told what.

    decide(registry, event) -> (registry, commands)

Pure: `up` is its I/O. Whoever asks is known by a name: a host's, or that of a caller on this
machine, which begins with @.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from lockstep.agent.job_offer import JobOffer
from lockstep.cluster.daemon.cluster_messages import (
    CloseJob,
    JobOffered,
    JobOpened,
    JobReport,
    JobState,
    JobWithdrawn,
    OpenJob,
    RequestFailed,
    TakeJobs,
    host_report,
)
from lockstep.errors import JobError, ProtocolError
from lockstep.system.messages import ErrorMessage, Message

MAX_OPEN_JOBS = 64
"""Jobs that one host, or one caller, may have open at one time."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A host that takes jobs."""

    workers: int
    jobs: Mapping[str, JobState] = field(default_factory=dict)
    """What it last said of each job that is open."""


@dataclass(frozen=True, kw_only=True)
class OpenedJob:
    """A job that is open to hosts."""

    offer: JobOffer
    asker: str


@dataclass(frozen=True, kw_only=True)
class Registry:
    """The state of the cluster."""

    members: Mapping[str, Member] = field(default_factory=dict)
    open_jobs: Mapping[str, OpenedJob] = field(default_factory=dict)
    """By job."""


# Events.


@dataclass(frozen=True)
class HostJoined:
    """A host takes jobs, with so many workers."""

    name: str
    workers: int


@dataclass(frozen=True)
class ConnectionLost:
    """A host, or who has asked for hosts, is not connected any more."""

    name: str
    why: str = "the host is gone"


@dataclass(frozen=True)
class JobOffering:
    """Somebody offers a job."""

    asker: str
    offer: JobOffer


@dataclass(frozen=True)
class JobClosed:
    """Who has offered a job offers it no more."""

    asker: str
    job: str


@dataclass(frozen=True)
class JobStateChanged:
    """A host says what became of a job."""

    name: str
    job: str
    state: JobState
    why: str


Event = HostJoined | ConnectionLost | JobOffering | JobClosed | JobStateChanged


@dataclass(frozen=True)
class Tell:
    """The command: send somebody a message."""

    to: str
    message: Message


Decision = tuple[Registry, tuple[Tell, ...]]


def decide(registry: Registry, event: Event) -> Decision:
    """The next state, and who is to be told what."""
    match event:
        case HostJoined(name, workers):
            members = {**registry.members, name: Member(workers=workers)}
            offers = [opened.offer for opened in registry.open_jobs.values()]
            told = tuple(_offer(name, offer) for offer in offers if offer.master != name)
            return replace(registry, members=members), told
        case ConnectionLost(name, why):
            return _lose(registry, name, why)
        case JobOffering(asker, offer):
            return _open(registry, asker, offer)
        case JobClosed(asker, job):
            opened = registry.open_jobs.get(job)
            return _close(registry, [job] if opened and opened.asker == asker else [])
        case JobStateChanged(name, job, state, why):
            return _report(registry, name, job, state, why)


def _lose(registry: Registry, name: str, why: str) -> Decision:
    members = {other: member for other, member in registry.members.items() if other != name}
    jobs = [job for job, opened in registry.open_jobs.items() if opened.asker == name]
    told = tuple(
        Tell(opened.asker, host_report(name, job, "failed", why))
        for job, opened in registry.open_jobs.items()
        if opened.asker != name and registry.members.get(name, _NOBODY).jobs.get(job) == "taken"
    )
    registry, others = _close(replace(registry, members=members), jobs)
    return registry, (*told, *others)


def _open(registry: Registry, asker: str, offer: JobOffer) -> Decision:
    opened = registry.open_jobs.get(offer.job)
    if opened is not None and opened.asker != asker:
        error = JobError(
            f"a job {offer.job} is offered already", expected="a name that no other job has"
        )
        return registry, (Tell(asker, RequestFailed(error=ErrorMessage.of(error))),)
    mine = [job for job, each in registry.open_jobs.items() if each.asker == asker]
    if opened is None and len(mine) >= MAX_OPEN_JOBS:
        error = JobError("too many jobs are open", expected=f"at most {MAX_OPEN_JOBS} at one time")
        return registry, (Tell(asker, RequestFailed(error=ErrorMessage.of(error))),)
    open_jobs = {**registry.open_jobs, offer.job: OpenedJob(offer=offer, asker=asker)}
    hosts = sorted(name for name in registry.members if name != offer.master)
    answer = Tell(asker, JobOpened(job=offer.job, hosts=hosts))
    return replace(registry, open_jobs=open_jobs), (
        answer,
        *(_offer(name, offer) for name in hosts),
    )


def _close(registry: Registry, jobs: list[str]) -> Decision:
    if not jobs:
        return registry, ()
    open_jobs = {job: opened for job, opened in registry.open_jobs.items() if job not in jobs}
    members = {
        name: replace(member, jobs={k: v for k, v in member.jobs.items() if k not in jobs})
        for name, member in registry.members.items()
    }
    told = tuple(Tell(name, JobWithdrawn(job=job)) for name in sorted(members) for job in jobs)
    return replace(registry, open_jobs=open_jobs, members=members), told


def _report(registry: Registry, name: str, job: str, state: JobState, why: str) -> Decision:
    member, opened = registry.members.get(name), registry.open_jobs.get(job)
    if member is None or opened is None:
        return registry, ()  # it has crossed with the end of one of them
    member = replace(member, jobs={**member.jobs, job: state})
    registry = replace(registry, members={**registry.members, name: member})
    return registry, (Tell(opened.asker, host_report(name, job, state, why)),)


def _offer(to: str, offer: JobOffer) -> Tell:
    return Tell(to, JobOffered(offer=offer))


_NOBODY = Member(workers=0)


def parse(who: str, message: Message) -> Event:
    """What somebody's message is.

    Raises:
        ProtocolError: nothing that is decided here.
    """
    match message:
        case TakeJobs(workers=workers):
            return HostJoined(who, workers)
        case OpenJob(offer=offer):
            return JobOffering(who, offer)
        case CloseJob(job=job):
            return JobClosed(who, job)
        case JobReport(job=job, state=state, why=why):
            return JobStateChanged(who, job, state, why)
    raise ProtocolError(
        f"{who} has sent something else than a request", found=type(message).__name__
    )
