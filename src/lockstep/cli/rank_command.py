"""Rank command: one process of a job whose processes torchrun, SLURM or a person starts."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.errors import JobError, RunInterrupted

if TYPE_CHECKING:
    from lockstep.cluster.ranks.rank_environment import RankInfo
    from lockstep.job.job import Job
    from lockstep.net.shared_secret import SharedSecret


def rank(
    job: Annotated[str, typer.Argument(help="A recipe, module:Task, file.py:Task, or a job file.")],
    secret: Annotated[
        Path | None, typer.Option(help="The secret that all hosts share: lockstep secret FILE.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="The port on which rank 0 listens for the others."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", min=1, help="Worker processes on this host.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The run folder, on rank 0.")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Which entry of the job file's `cluster` this is: worker:0, ps:0."),
    ] = None,
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the others.")] = 1800.0,
) -> None:
    """Run one rank of a job: the one given by torchrun or SLURM, or an entry of `cluster`."""
    from lockstep.cluster.ranks.launcher import shared_secret
    from lockstep.system.folders import TemporaryFolder

    signal.signal(signal.SIGTERM, _end)
    wanted = read_job(job)
    info = _info(wanted, task)
    if port is not None:
        info = replace(info, port=port)
    shared = shared_secret(info, secret)
    with TemporaryFolder("lockstep-rank-") as folder:
        if info.rank == 0:
            _lead(info, shared, folder.path, wanted, workers, out, wait)
        else:
            _follow(info, shared, folder.path, wanted, workers, wait)


def _info(job: Job, task: str | None) -> RankInfo:
    from lockstep.cluster.ranks.cluster_spec import rank_in
    from lockstep.cluster.ranks.rank_environment import rank_info

    if (job.cluster is None) != (task is None):
        raise JobError(
            "the job file's cluster and --task do not fit each other",
            expected="both, or neither",
            found="no --task" if task is None else "no `cluster` in the job file",
            fix="add the missing one, or leave out the other",
        )
    if job.cluster is None or task is None:
        return rank_info(os.environ)
    return rank_in(job.cluster, task)


def _lead(
    info: RankInfo,
    shared: SharedSecret,
    folder: Path,
    job: Job,
    workers: int | None,
    out: str | None,
    wait: float,
) -> None:
    from lockstep.api.training import run
    from lockstep.cluster.ranks.cluster_spec import on_ranks
    from lockstep.cluster.ranks.launcher import RankLauncher

    job = job if job.cluster is None else on_ranks(job)
    try:
        with RankLauncher(info, shared, folder, workers=workers, wait=wait) as ranks:
            result = run(job.replace(out=out) if out else job, on=ranks)
    except RunInterrupted as interrupted:
        raise interrupted.stopped from None
    print(json.dumps(result.to_message()))


def _follow(
    info: RankInfo, shared: SharedSecret, folder: Path, job: Job, workers: int | None, wait: float
) -> None:
    from lockstep.agent.agent import serve
    from lockstep.cluster.ranks.launcher import enter, own_address, show
    from lockstep.job.task_source import source_of
    from lockstep.system import machine

    expected, host = source_of(job).name, own_address(info)
    identity, offer = enter(info, shared, folder, wait)
    if offer.task != expected:
        raise JobError(
            "rank 0 runs another job than this rank was started for",
            expected=expected,
            found=ascii(offer.task),
            fix="start all ranks with the same command",
        )
    workers = workers or machine.cores()
    serve(identity, offer, workers=workers, host=host, report=show)


def read_job(name: str) -> Job:
    """The job of a recipe, of a named task, or of a job file.

    Raises:
        JobError: there is no such recipe, or the job file cannot be used.
    """
    from lockstep.job.job import Job
    from lockstep.job.job_file import SUFFIXES, read_job_file
    from lockstep.recipes import check_name

    job = read_job_file(Path(name)) if name.endswith(SUFFIXES) else Job(task=name)
    if ":" not in str(job.task):
        check_name(str(job.task))
    return job


def _end(number: int, _: FrameType | None) -> None:
    """Exit by SystemExit, so that context managers close what they opened."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(128 + number)
