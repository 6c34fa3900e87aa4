"""Rank environment: what torchrun and SLURM tell a process of its rank among others. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.errors import JobError

FIRST_PORT, PORTS = 15000, 15000
"""Below the ports that kernels choose by themselves."""


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """One process of a job that has one on each host."""

    rank: int
    size: int
    host: str
    """Where rank 0 is."""
    port: int
    """Where newcomers find it."""
    job: str
    """A name for this run that is the same in all its processes, and in no other run's."""
    own: str | None = None
    """Where this process is, if it was told."""


def rank_info(environment: Mapping[str, str]) -> RankInfo:
    """What torchrun, or else SLURM, has told this process.

    Raises:
        JobError: neither has, or there are several processes on one host.
    """
    if "RANK" in environment:
        return _torchrun(environment)
    if "SLURM_PROCID" in environment:
        return _slurm(environment)
    raise JobError(
        "nothing says which process of the job this is",
        expected="the variables of torchrun (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), "
        "or those of srun (SLURM_PROCID, SLURM_NTASKS, SLURM_JOB_NODELIST, SLURM_JOB_ID)",
        found="neither RANK nor SLURM_PROCID",
        fix="torchrun --nnodes N --nproc-per-node 1 ... -m lockstep rank JOB, "
        "or: srun --ntasks-per-node=1 lockstep rank JOB",
    )


def _torchrun(environment: Mapping[str, str]) -> RankInfo:
    local, per_host = _number(environment, "LOCAL_RANK", 0), "--nproc-per-node 1"
    _check_alone(max(local + 1, _number(environment, "LOCAL_WORLD_SIZE", 1)), per_host)
    address, port = _text(environment, "MASTER_ADDR"), _number(environment, "MASTER_PORT")
    run = environment.get("TORCHELASTIC_RUN_ID", "")
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return _checked(
        RankInfo(
            rank=_number(environment, "RANK"),
            size=_number(environment, "WORLD_SIZE"),
            host=address,
            port=port + 1,
            job=f"torchrun {address}:{port} {run} {attempt}",
        )
    )


def _slurm(environment: Mapping[str, str]) -> RankInfo:
    size, local = _number(environment, "SLURM_NTASKS"), _number(environment, "SLURM_LOCALID", 0)
    hosts = _number(environment, "SLURM_NNODES", size)
    _check_alone(max(local + 1, -(-size // max(hosts, 1))), "--ntasks-per-node=1")
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID", 0)
    attempt = environment.get("SLURM_RESTART_COUNT", "0")
    nodes = environment.get("SLURM_STEP_NODELIST") or _text(environment, "SLURM_JOB_NODELIST")
    return _checked(
        RankInfo(
            rank=_number(environment, "SLURM_PROCID"),
            size=size,
            host=environment.get("MASTER_ADDR") or first_host(nodes),
            port=FIRST_PORT + (job + step) % PORTS,
            job=f"slurm {job} {step} {attempt}",
        )
    )


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes them: `node[07-09,12],login` gives `node07`."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[\]])+", nodes)
    if first is None:
        raise JobError("the list of hosts cannot be read", expected="names", found=repr(nodes))
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def _checked(info: RankInfo) -> RankInfo:
    if not 0 <= info.rank < info.size or not 0 < info.port < 65536:
        raise JobError("this process has an impossible rank", expected="a rank", found=str(info))
    return info


def _check_alone(count: int, option: str) -> None:
    if count > 1:
        raise JobError(
            "several processes of the job are on this host",
            expected="one on each host; it runs as many workers as the host has cores",
            found=f"{count} or more",
            fix=f"start it with {option}; see --workers",
        )


def _text(environment: Mapping[str, str], name: str) -> str:
    found = environment.get(name)
    if not found:
        raise JobError(f"the variable {name} is missing", fix="start the job with torchrun or srun")
    return found


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environment:
        return default
    text = _text(environment, name)
    if not text.isascii() or not text.isdecimal():
        raise JobError(f"the variable {name} is no number", found=repr(text))
    return int(text)
