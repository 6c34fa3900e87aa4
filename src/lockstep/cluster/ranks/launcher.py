"""A job whose processes are started one on each host: by torchrun, by SLURM, or by hand.

    torchrun --nnodes 2 --nproc-per-node 1 ... -m lockstep.cluster.ranks.launcher --secret FILE
    job.yaml srun --ntasks-per-node=1 python -m lockstep.cluster.ranks.launcher --secret FILE
    job.yaml python -m lockstep.cluster.ranks.launcher --secret FILE --task worker:0 job.yaml

Rank 0 is the master; the others become its agents. They enter with what they make of a secret
that all have in a file. The result of rank 0 is one JSON document on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Annotated, Self

import typer

from lockstep.agent.job_offer import Offer
from lockstep.cluster.ranks.cluster_spec import on_ranks, place_in
from lockstep.cluster.ranks.rank_environment import Place, place_of
from lockstep.cluster.state_folder import (
    SECRET,
    State,
    address_towards,
    default_state,
    is_loopback,
)
from lockstep.cluster.temporary import TemporaryFolder
from lockstep.errors import (
    IdentityError,
    JobError,
    PeerClosedError,
    PeerTimeoutError,
)
from lockstep.job.job import Job
from lockstep.job.job_file import SUFFIXES, read_job_file
from lockstep.net.enrolment import JoinServer, join
from lockstep.net.identity import Identity
from lockstep.net.shared_secret import RankInvitation, SharedSecret, make_secret, read_secret
from lockstep.net.transport import Report, ignore

ATTEMPT_SECONDS, PAUSE_SECONDS = 10.0, 0.5
MASTER = "rank-0"


class Ranks:
    """Brings agents to the other ranks, which are there already. A `Launcher`, of rank 0."""

    def __init__(
        self, place: Place, shared: SharedSecret, folder: Path, *, workers: int | None, wait: float
    ) -> None:
        """`workers` is for rank 0's own host; the others may enter for `wait` seconds."""
        from lockstep.net.certificate_authority import Authority  # needs the extra

        self._place, self._shared, self._wait = place, shared, wait
        self.workers, self.host = workers, own_address(place)
        self.report: Report = ignore
        self._authority = Authority.open(folder / "authority")
        self.identity = self._authority.enrol(folder / "node", MASTER)
        self._server: JoinServer | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def offer(self, offer: Offer) -> tuple[str, ...]:
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
                self._authority.sign,
                host=self.host,
                port=self._place.port,
                greeting={"offer": offer.to_message()},
                proof=self._shared.proof(self._authority.certificate),
                report=show,
            )
        except OSError as error:
            raise IdentityError(
                f"rank 0 cannot listen on {self.host}:{self._place.port}",
                expected="a port that is free",
                found=str(error),
                fix="give all processes another one with --port",
            ) from None
        ranks = range(1, self._place.size)
        for rank in ranks:
            self._server.admit(self._shared.of_rank(rank), seconds=self._wait)
        return tuple(map(_name, ranks))

    def close(self) -> None:
        """Let nobody in any more."""
        if self._server is not None:
            self._server.close()
            self._server = None


def enter(place: Place, shared: SharedSecret, folder: Path, wait: float) -> tuple[Identity, Offer]:
    """What a rank is told by rank 0, as soon as that listens, within `wait` seconds.

    Raises:
        RefusedError: whoever answers has another secret, or has let this rank in before.
        PeerTimeoutError, PeerClosedError: nobody answers.
    """
    invitation = RankInvitation(
        shared=shared, rank=place.rank, host=place.host, port=place.port, node=MASTER
    )
    limit = time.monotonic() + wait
    while True:
        try:
            identity, greeting = join(
                invitation, folder / "node", _name(place.rank), timeout=ATTEMPT_SECONDS
            )
            return identity, Offer.from_message(greeting.get("offer", {}))
        except (PeerClosedError, PeerTimeoutError) as error:
            if time.monotonic() > limit:
                error.fix = "see whether rank 0 runs, and that all have the same --port"
                raise
        time.sleep(PAUSE_SECONDS)  # there is nothing that would tell when it listens


def own_address(place: Place) -> str:
    """The address that others reach this host at.

    Raises:
        IdentityError: none can be told.
    """
    if place.own is not None:
        return place.own
    if is_loopback(place.host):
        return "127.0.0.1"
    fix = "torchrun: --master-addr ADDRESS; SLURM: MASTER_ADDR=ADDRESS"
    try:
        found = address_towards((place.host, place.port))
    except IdentityError as error:
        error.fix = fix  # SLURM's names of nodes need not be names of hosts
        raise
    if is_loopback(found):
        raise IdentityError(
            f"the name {place.host} leads from this host to itself alone",
            expected="a name or an address that other hosts reach it at",
            found=found,
            fix=fix,
        )
    return found


def shared_secret(place: Place, path: Path | None) -> SharedSecret:
    """The job's secret, from a file; on this machine alone, from one that is made on first use.

    Raises:
        IdentityError: there is no file, or it cannot be used.
    """
    if path is None and not is_loopback(place.host):
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
    return SharedSecret(secret=read_secret(path), job=place.job)


def _name(rank: int) -> str:
    return f"rank-{rank}"


def main(
    job: Annotated[str, typer.Argument(help="A recipe, module:Task, file.py:Task, or a job file.")],
    secret: Annotated[
        Path | None, typer.Option(help="The secret that all hosts share: lockstep secret FILE.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Where rank 0 lets the others in.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", min=1, help="Worker processes on this host.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The run folder, on rank 0.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Which entry of the job file's `cluster` this is: worker:0, ps:0."),
    ] = None,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for others.")] = 1800.0,
) -> None:
    """Take part in a job as the rank that torchrun or SLURM has given this process, or as an entry
    of the cluster that the job file describes."""
    signal.signal(signal.SIGTERM, _end)
    wanted = read_job(job)
    place = _place(wanted, task)
    if port is not None:
        place = replace(place, port=port)
    shared = shared_secret(place, secret)
    with TemporaryFolder("lockstep-rank-") as folder:
        if place.rank == 0:
            _lead(place, shared, folder.path, wanted, workers, out, wait)
        else:
            _follow(place, shared, folder.path, wanted, workers, wait)


def _place(job: Job, task: str | None) -> Place:
    if (job.cluster is None) != (task is None):
        raise JobError(
            "the job file's cluster and --task do not fit each other",
            expected="both, or neither",
            found="no --task" if task is None else "no `cluster` in the job file",
            fix="add the one, or leave out the other",
        )
    if job.cluster is None or task is None:
        return place_of(os.environ)
    return place_in(job.cluster, task)


def _lead(
    place: Place,
    shared: SharedSecret,
    folder: Path,
    job: Job,
    workers: int | None,
    out: str | None,
    wait: float,
) -> None:
    from lockstep.api.training import run

    job = job if job.cluster is None else on_ranks(job)
    with Ranks(place, shared, folder, workers=workers, wait=wait) as ranks:
        result = run(job.replace(out=out) if out else job, on=ranks)
    print(json.dumps(result.to_message()))


def _follow(
    place: Place, shared: SharedSecret, folder: Path, job: Job, workers: int | None, wait: float
) -> None:
    from lockstep.agent.agent import serve
    from lockstep.job.task_source import source_of
    from lockstep.system import numerics

    expected, host = source_of(job).name, own_address(place)
    identity, offer = enter(place, shared, folder, wait)
    if offer.task != expected:
        raise JobError(
            "rank 0 runs another job than this rank was started for",
            expected=expected,
            found=ascii(offer.task),
            fix="start all ranks with the same command",
        )
    workers = workers or numerics.cores()
    serve(identity, offer, workers=workers, host=host, report=show)


def read_job(name: str) -> Job:
    """The job that a name or a job file describes."""
    return read_job_file(Path(name)) if name.endswith(SUFFIXES) else Job(task=name)


def show(who: str, why: str) -> None:
    """Say on stderr what happens."""
    print(f"lockstep: {who}: {why}", file=sys.stderr, flush=True)


def _end(number: int, _: FrameType | None) -> None:
    """Leave by way of everything that has to be closed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(128 + number)


if __name__ == "__main__":
    from lockstep.cli.main import guarded

    guarded(lambda: typer.run(main))
