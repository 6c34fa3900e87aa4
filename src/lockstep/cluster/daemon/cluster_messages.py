"""Cluster messages: what `up`, its members, and those who want hosts for a job say to each other.

    from                       to up                   from up
    a member                   TakeJobs, JobReport     JobOffered, JobWithdrawn
    who wants hosts            OpenJob, CloseJob       JobOpened, HostReport, RequestFailed
    both of these              AskCertificate          CertificateIssued, CertificatesRevoked
    a command on its machine   AskCluster, AskHosts,   ClusterAnswer, HostsAnswer, TokenAnswer,
                               AskToken, RemoveHost    HostRemoved, RequestFailed

Ray's driver answers those who want hosts as `up` does; it says `DriverReady` first.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from lockstep.agent.job_offer import Address, JobOffer
from lockstep.system.messages import Codec, ErrorMessage, Label, Message

JobState = Literal["taken", "refused", "ended", "failed"]
"""What becomes of a job on a host."""
STATES: tuple[str, ...] = get_args(JobState)
MAX_WHY = 2000
"""Characters."""
MAX_TOKEN_SECONDS = 7 * 86400.0
MAX_HOSTS = 4096
MAX_REVOKED = 10_000

Why = Annotated[str, msgspec.Meta(max_length=MAX_WHY)]
Hosts = Annotated[list[Label], msgspec.Meta(max_length=MAX_HOSTS)]
Workers = Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
Serial = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{1,40}\Z")]
Moment = Annotated[float, msgspec.Meta(ge=0.0, le=1e11)]


class TakeJobs(Message):
    """The sender takes jobs, with so many workers."""

    workers: Workers


class JobReport(Message):
    """What becomes of a job on the sender's host."""

    job: Label
    state: JobState
    why: Why = ""


class OpenJob(Message):
    """The sender offers a job to all hosts, until it closes it or is gone."""

    offer: JobOffer


class CloseJob(Message):
    """The sender offers a job no more."""

    job: Label


class AskCluster(Message):
    """Which cluster is this?"""


class AskHosts(Message):
    """Which hosts are there?"""


class AskToken(Message):
    """Make a join token."""

    seconds: Annotated[float, msgspec.Meta(ge=0.0, le=MAX_TOKEN_SECONDS)]
    """For how long it is valid."""


class RemoveHost(Message):
    """A host is a member no more, and is not let in again with the certificate that it has."""

    name: Label


class AskCertificate(Message):
    """The sender's certificate is to be renewed."""

    request: Annotated[bytes, msgspec.Meta(max_length=8 << 10)]
    """A certificate request, in PEM, for its name and its key."""


class JobOffered(Message):
    """A job that the receiver may take."""

    offer: JobOffer


class JobWithdrawn(Message):
    """A job is not offered any more."""

    job: Label


class JobOpened(Message):
    """The receiver's job is offered to these hosts."""

    job: Label
    hosts: Hosts


class HostReport(Message):
    """What becomes of the receiver's job on a host."""

    host: Label
    job: Label
    state: JobState
    why: Why = ""


class RequestFailed(Message):
    """The receiver's request was refused."""

    error: ErrorMessage


class ClusterAnswer(Message):
    """The name of the host that `up` runs on, and where it listens."""

    node: Label
    address: Address


class HostRow(Message):
    """A host, and what it last said of each open job."""

    name: Label
    workers: Workers
    jobs: Annotated[dict[Label, JobState], msgspec.Meta(max_length=MAX_HOSTS)]


class HostsAnswer(Message):
    """The hosts that are there."""

    hosts: Annotated[list[HostRow], msgspec.Meta(max_length=MAX_HOSTS)]


class TokenAnswer(Message):
    """A join token."""

    token: Annotated[str, msgspec.Meta(max_length=1024)]


class HostRemoved(Message):
    """A host was removed; whether it was connected, the jobs that it took part in, and those of
    which it was the master, which are offered no more."""

    name: Label
    connected: bool
    jobs: Annotated[list[Label], msgspec.Meta(max_length=MAX_HOSTS)]
    offers: Annotated[list[Label], msgspec.Meta(max_length=MAX_HOSTS)]


class CertificateIssued(Message):
    """The receiver's new certificate, in PEM."""

    certificate: Annotated[bytes, msgspec.Meta(max_length=16 << 10)]


class CertificatesRevoked(Message):
    """The certificates of hosts that were removed: until when each would be valid, in seconds
    since 1970, by its serial number."""

    serials: Annotated[dict[Serial, Moment], msgspec.Meta(max_length=MAX_REVOKED)]


class DriverReady(Message):
    """Ray's driver is connected; the address that others reach this node at."""

    address: Label


class ClusterAddress(Message):
    """What a newcomer is told besides its certificate: where `up` listens."""

    address: Address


FROM_HOSTS: Codec[Message] = Codec(TakeJobs | JobReport | OpenJob | CloseJob | AskCertificate)
"""What `up` understands of hosts."""
FROM_LOCAL: Codec[Message] = Codec(
    AskCluster | AskHosts | AskToken | RemoveHost | OpenJob | CloseJob
)
"""What `up` understands on its own machine's socket."""
FROM_UP: Codec[Message] = Codec(
    JobOffered
    | JobWithdrawn
    | JobOpened
    | HostReport
    | RequestFailed
    | ClusterAnswer
    | HostsAnswer
    | TokenAnswer
    | HostRemoved
    | CertificateIssued
    | CertificatesRevoked
)
"""What is understood of `up`."""
FROM_DRIVER: Codec[Message] = Codec(DriverReady | JobOpened | HostReport | RequestFailed)
TO_DRIVER: Codec[Message] = Codec(OpenJob | CloseJob)
GREETING: Codec[ClusterAddress] = Codec(ClusterAddress)


def report_of(job: str, state: JobState, why: str) -> JobReport:
    """A report, with no more than may be said of why."""
    return JobReport(job=job, state=state, why=_cut(why))


def host_report(host: str, job: str, state: JobState, why: str) -> HostReport:
    """The same of a host."""
    return HostReport(host=host, job=job, state=state, why=_cut(why))


def _cut(why: str) -> str:
    return why.encode(errors="backslashreplace").decode()[:MAX_WHY]
