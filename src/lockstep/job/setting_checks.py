"""Setting checks: settings of a job have to fit each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.errors import JobError
from lockstep.job.slice_words import MOST_BOARDS, check_slices, check_team, several_hosts

Settings = Mapping[str, Any]
"""By name."""


def check_together(job: Settings, defaults: Settings) -> None:
    """Check that a job's settings fit each other. Each is valid by itself.

    Raises:
        JobError: two do not.
    """
    _check_compression(job)
    _check_local_data(job)
    _check_servers(job)
    _check_shards(job)
    _check_monitor(job, defaults)
    _check_name(job)
    _check_device(job, defaults)
    check_slices(job["slices"], job["slice_plan"], job["local_steps"])
    check_team(job["team"], job["slices"], job["workers"], compiled=job["compile"])
    _check_team_host(job)
    _check_slice_hosts(job, defaults)


def _check_compression(job: Settings) -> None:
    if job["compression"] == "none":
        if job["groups"] is not None:
            raise JobError(
                "groups are given without compression",
                expected="compression = bf16, int8 or topk, with groups",
                found=f"groups = {job['groups']}, compression = none",
                fix="leave groups out, or choose a compression",
            )
    elif job["ownership"] != "replicated":
        raise JobError(
            "compression does not go with this ownership: values of parameters are returned",
            expected="ownership = replicated",
            found=job["ownership"],
            fix="leave one out",
        )


def _check_local_data(job: Settings) -> None:
    if job["data"] == "local" and (job["ownership"], job["compression"]) != ("replicated", "none"):
        raise JobError(
            "data = local goes with no other division of the work among hosts",
            expected="ownership = replicated, compression = none",
            found=f"ownership = {job['ownership']}, compression = {job['compression']}",
            fix="leave one out",
        )


def _check_servers(job: Settings) -> None:
    if bool(job["servers"]) != (job["ownership"] == "servers"):
        raise JobError(
            "servers and ownership do not fit each other",
            expected="names of servers with ownership = servers, and with no other",
            found=f"ownership = {job['ownership']}, servers = {list(job['servers'])}",
            fix="set both, or neither",
        )


def _check_monitor(job: Settings, defaults: Settings) -> None:
    for name, needed in (
        ("monitor_mode", "monitor"),
        ("stop_patience", "monitor"),
        ("stop_min_delta", "stop_patience"),
    ):
        if job[name] != defaults[name] and job[needed] is None:
            raise JobError(
                f"{name} is given without {needed}",
                expected=f"{needed}, with {name}",
                found=f"{name} = {job[name]}, {needed} = None",
                fix=f"set {needed}, or leave {name} out",
            )


def _check_name(job: Settings) -> None:
    name = job["run_name"]
    if name is not None and (not name.isprintable() or "/" in name or name.startswith(".")):
        raise JobError(
            "run_name cannot be the name of a folder",
            expected="printable characters without /, the first no dot",
            found=repr(name),
            fix="choose another; out says in which folder the run is",
        )


WITHOUT_HOMES = {
    "compression": "what a codec leaves out is kept in the host's segment",
    "local_steps": "what a shard's own optimizer keeps is in the host's segment",
    "audit": "it compares what workers have left in the host's segments",
    "team": "its members compute in the host's segments",
    "compile": "kernels are bound to the host's segments before the first fork",
}
"""Settings that do not go with homes of workers' own, and why."""


WITHOUT_GPU = {"slices": "their random numbers come from generators on the CPU"}
"""The same with a GPU alone."""


def _check_device(job: Settings, defaults: Settings) -> None:
    if job["device"] == "cuda" and not job["experimental"]:
        raise JobError(
            "device: cuda has been written and reviewed, and has not been run on a GPU",
            expected="device = cpu, or experimental = true with it",
            found="device = cuda, experimental = false",
            fix="leave device out; or, to try it, give --experimental (experimental: true)",
        )
    if job["device"] == "cuda" and job["workers"] is None:
        raise JobError(
            "device: cuda, and the number of workers is left open",
            expected="workers: one for each GPU that is to take part",
            found="workers = None",
            fix="set workers; nothing is measured on a GPU to choose it",
        )
    refused = {} if job["device"] == "cpu" else WITHOUT_HOMES
    if job["device"] == "cuda":
        refused = WITHOUT_HOMES | WITHOUT_GPU
    _refuse(job, defaults, "device", refused, "device = cpu, or {} left out")


def _refuse(
    job: Settings, defaults: Settings, setting: str, refused: Mapping[str, str], expected: str
) -> None:
    """Refuse what does not go with the value of a setting: `refused` says why, by name. `expected`
    has a place for the name."""
    for name, why in refused.items():
        if job[name] != defaults[name]:
            raise JobError(
                f"{name} does not go with {setting}: {job[setting]}: {why}",
                expected=expected.format(name),
                found=f"{setting} = {job[setting]}, {name} = {job[name]}",
                fix="leave one out",
            )


def _check_team_host(job: Settings) -> None:
    """Refuse what says that there are other hosts."""
    said = [name for name in ("servers", "cluster") if job[name]]
    if job["ownership"] == "sharded":
        said.append("ownership")
    if job["team"] > 1 and said:
        raise several_hosts(job["team"], ", ".join(said))


WITHOUT_PARTNERS = {
    "team": "each worker has its partners on other hosts",
    "local_steps": "a round of steps is one worker's",
    "audit": "a shard is computed again by one worker",
    "compile": "a compiled shard runs as a whole",
    "device": "slices are in the hosts' segments",
}
"""Settings that do not go with slices of each host's own, and why."""


def _check_slice_hosts(job: Settings, defaults: Settings) -> None:
    if job["ownership"] != "slices":
        return
    if job["slices"] == 1:
        raise JobError(
            "ownership: slices, and there is one slice: hosts would have nothing to divide",
            expected="slices: at least as many as there are hosts",
            found="slices = 1",
            fix="set slices (the numbers depend on it), or leave out ownership",
        )
    if job["slices"] > MOST_BOARDS:
        raise JobError(
            "there are too many slices for ownership: slices",
            expected=f"at most {MOST_BOARDS}",
            found=f"slices = {job['slices']}",
            fix="set slices to as many as there may be hosts",
        )
    expected = "{} left out, or another ownership"
    _refuse(job, defaults, "ownership", WITHOUT_PARTNERS, expected)


def _check_shards(job: Settings) -> None:
    team = job["team"]
    if job["ownership"] == "slices":  # each host may have a worker for each shard
        team = job["slices"]
    if team > 1 and job["workers"] and job["shards"] and job["shards"] * team < job["workers"]:
        raise JobError(
            "there are more workers than shards have members: some would never have work",
            expected=f"workers <= shards * team = {job['shards'] * team}",
            found=f"workers = {job['workers']}, shards = {job['shards']}, team = {team}",
            fix=f"set workers to {job['shards'] * team} or fewer, or shards or team to more",
        )
    if team == 1 and job["workers"] and job["shards"] and job["shards"] < job["workers"]:
        raise JobError(
            "there are more workers than shards: some would never have work",
            expected=f"shards >= workers = {job['workers']}",
            found=f"shards = {job['shards']}",
            fix=f"set shards to {job['workers']} or more, or workers to {job['shards']} or fewer",
        )
