"""Rank launcher: for a job whose processes torchrun, SLURM or people start, one on each host.

    torchrun --nnodes 2 --nproc-per-node 1 ... -m lockstep rank --secret FILE job.yaml
    srun --ntasks-per-node=1 lockstep rank --secret FILE job.yaml
    lockstep rank --secret FILE --task worker:0 job.yaml

Rank 0 is the master; the others become its agents. They enter with what they make of a secret
that all have in a file. The result of rank 0 is one JSON document on stdout.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from pathlib import Path
from typing import Self

from lockstep.agent.job_offer import OFFER, JobOffer
from lockstep.cluster.ranks.rank_environment import RankInfo
from lockstep.cluster.state_folder import (
    SECRET,
    State,
    address_towards,
    default_state,
    is_loopback,
)
from lockstep.errors import (
    IdentityError,
    JobError,
    PeerClosedError,
    PeerTimeoutError,
)
from lockstep.net.certificates import RUN_SECONDS, Role
from lockstep.net.enrolment import JoinServer, join
from lockstep.net.identity import Identity
from lockstep.net.shared_secret import RankInvitation, SharedSecret, make_secret, read_secret
from lockstep.net.transport import Report, ignore
from lockstep.system.messages import encode, printable

ATTEMPT_SECONDS, PAUSE_SECONDS = 10.0, 0.5
MASTER = "rank-0"


class RankLauncher:
    """Brings agents to the other ranks, which are there already. A `Launcher`, of rank 0."""

    def __init__(
        self,
        info: RankInfo,
        shared: SharedSecret,
        folder: Path,
        *,
        workers: int | None,
        wait: float,
    ) -> None:
        """`workers` is for rank 0's own host; the others may enter for `wait` seconds."""
        from lockstep.net.certificate_authority import Authority  # needs the extra

        self._info, self._shared, self._wait = info, shared, wait
        self.workers, self.host = workers, own_address(info)
        self.report: Report = ignore
        self._authority = Authority.open(folder / "authority")
        self.identity = self._authority.enrol(
            folder / "node", MASTER, role=Role.HEAD, seconds=RUN_SECONDS
        )
        self._server: JoinServer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def offer(self, offer: JobOffer) -> tuple[str, ...]:
        """Let the other ranks in, and tell each of the job. Returns their names.

        Raises:
            IdentityError: nobody can listen there.
            JobError: the job would send its code, which every rank has.
        """
        if offer.code is not None:
            raise JobError(
                "ranks do not take code: each was started with the task that it runs",
                expected="a job without ship_code",
                found=f"ship_code, for {offer.task}",
                fix="leave it out, and have the code on every host",
            )
        try:
            self._server = JoinServer(
                self.identity,
                functools.partial(self._authority.sign, seconds=RUN_SECONDS),
                host=self.host,
                port=self._info.port,
                greeting=encode(offer),
                proof=self._shared.proof(self._authority.certificate),
                report=show,
            )
        except OSError as error:
            raise IdentityError(
                f"rank 0 cannot listen on {self.host}:{self._info.port}",
                expected="a port that is free",
                found=str(error),
                fix="give all processes another one with --port",
            ) from None
        ranks = range(1, self._info.size)
        for rank in ranks:
            self._server.admit(self._shared.of_rank(rank), seconds=self._wait)
        return tuple(map(_name, ranks))

    def close(self) -> None:
        """Let nobody in any more."""
        if self._server is not None:
            self._server.close()
            self._server = None


def enter(
    info: RankInfo, shared: SharedSecret, folder: Path, wait: float
) -> tuple[Identity, JobOffer]:
    """What a rank is told by rank 0, as soon as that listens, within `wait` seconds.

    Raises:
        RefusedError: whoever answers has another secret, or has let this rank in before.
        PeerTimeoutError, PeerClosedError: nobody answers.
    """
    invitation = RankInvitation(
        shared=shared, rank=info.rank, host=info.host, port=info.port, node=MASTER
    )
    limit = time.monotonic() + wait
    while True:
        try:
            identity, greeting = join(
                invitation, folder / "node", _name(info.rank), timeout=ATTEMPT_SECONDS
            )
            return identity, OFFER.decode(greeting)
        except (PeerClosedError, PeerTimeoutError) as error:
            if time.monotonic() > limit:
                error.fix = "see whether rank 0 runs, and that all have the same --port"
                raise
        time.sleep(PAUSE_SECONDS)  # there is nothing that would tell when it listens


def own_address(info: RankInfo) -> str:
    """The address that others reach this host at.

    Raises:
        IdentityError: none can be told.
    """
    if info.own is not None:
        return info.own
    if is_loopback(info.host):
        return "127.0.0.1"
    fix = "torchrun: --master-addr ADDRESS; SLURM: MASTER_ADDR=ADDRESS"
    try:
        found = address_towards((info.host, info.port))
    except IdentityError as error:
        error.fix = fix  # SLURM's names of nodes need not be names of hosts
        raise
    if is_loopback(found):
        raise IdentityError(
            f"the name {info.host} leads from this host to itself alone",
            expected="a name or an address that other hosts reach it at",
            found=found,
            fix=fix,
        )
    return found


def shared_secret(info: RankInfo, path: Path | None) -> SharedSecret:
    """The job's secret, from a file; on this machine alone, from one that is made on first use.

    Raises:
        IdentityError: there is no file, or it cannot be used.
    """
    if path is None and not is_loopback(info.host):
        raise IdentityError(
            "hosts that do not share a secret cannot know each other",
            expected="--secret FILE, with the same content on every host",
            found="none, and rank 0 is on another machine than this one may be",
            fix="lockstep secret FILE; then copy it to every host, with mode 0600",
        )
    if path is None:
        path = State(default_state()).path / SECRET
        with contextlib.suppress(IdentityError):  # it is there
            make_secret(path)
    return SharedSecret(secret=read_secret(path), job=info.job)


def _name(rank: int) -> str:
    return f"rank-{rank}"


def show(who: str, why: str) -> None:
    """Say on stderr what happens."""
    print(printable(f"lockstep: {who}: {why}"), file=sys.stderr, flush=True)
