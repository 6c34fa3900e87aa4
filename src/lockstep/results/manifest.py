"""Manifest: what is needed to repeat a run, and the identity that its results depend on."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from lockstep.errors import DataError, IntegrityError, JobError
from lockstep.job.job import SETTINGS, Job
from lockstep.job.task import Task
from lockstep.job.task_source import TaskSource, source_of
from lockstep.planning.plan import Plan
from lockstep.results.origin_mark import is_own, mark_of
from lockstep.system.json_files import plain

LATER = {
    "shuffle": True, "drop_last": False, "compile": False, "memory_format": "contiguous",
    "monitor": None, "monitor_mode": "min", "stop_patience": None, "stop_min_delta": 0.0,
    "slices": 1, "slice_plan": None,
    "sample_order": "", "device": "cpu",
}  # fmt: skip
"""Fields that earlier manifests lack, with what held then: they are in an identity where they
differ, so that the identities of other runs stay as they are."""
GPU_FIELDS = ("gpu", "gpu_processors", "driver", "cuda", "cudnn", "device_probe")
"""Of a numerics profile: what a GPU's bits depend on."""
SAME_NUMBERS = {"device": {"cpu-apart": "cpu"}}
"""By field: values that compute the very numbers of another."""
_PLANNED = {field.name for field in dataclasses.fields(Plan)}
IDENTITY = (
    *(
        name
        for name, setting in SETTINGS.items()
        # The plan turns `data_epochs` into `steps`, and `data` into `holdings`.
        if setting.declared.changes_numbers and name in _PLANNED and name not in LATER
    ),
    "train_samples",
    "eval_samples",
)
"""The fields of a plan that the results depend on."""


def make_manifest(
    source: TaskSource, job: Job, plan: Plan, profile: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of a new run, as JSON can hold it.

    `digest` is that of `identity`: the same for any number of workers. The ledger begins with it.
    """
    message = plan.to_message()
    identity = {
        "task": source.name.rpartition(":")[2] or source.name,
        "args": dict(source.args),
        "code": facts["code"],
        **{name: message[name] for name in IDENTITY},
        **{n: counted(n, message[n]) for n in LATER if counted(n, message[n]) != LATER[n]},
        **({"holdings": message["holdings"]} if plan.holdings else {}),
    }
    recorded = {
        "name": source.name,
        "args": dict(source.args),
        "importable": source.payload is None,
    }
    return {
        "format": 1,
        "name": job.run_name or source.label,
        "source": recorded,
        "origin": mark_of(plain(recorded)),
        "job": {name: getattr(job, name) for name in SETTINGS},
        "plan": message,
        "profile": profile,
        "probe": facts["probe"],
        "code": facts["code"],
        "fitted": facts["fitted"],
        "identity": identity,
        "digest": _digest(identity),
        "versions": {"python": platform.python_version(), "torch": profile["torch"]},
    }


def counted(name: str, value: Any) -> Any:
    """A field of a plan as it counts in an identity."""
    return SAME_NUMBERS[name].get(value, value) if name in SAME_NUMBERS else value


def scope_of(manifest: Mapping[str, Any]) -> str:
    """Where the fingerprint of a run holds, in words."""
    plan, profile = manifest["plan"], manifest["profile"]
    most = plan["shards"] * plan.get("team", 1)
    workers = "1 worker" if most == 1 else f"1 to {most} workers"
    threads = "1 thread" if plan["threads"] == 1 else f"{plan['threads']} threads"
    kernels = "AVX2" if plan["numerics"] == "portable" else profile["capability"]
    if "gpu" in profile:
        kernels = f"{profile['gpu']} ({profile['gpu_processors']} multiprocessors), driver "
        kernels += f"{profile['driver']}, CUDA {profile['cuda']}, cuDNN {profile['cudnn']}"
    kernels += f", compiled by {profile['compiler']}" if "compiler" in profile else ""
    return f"{workers} of {threads}, on machines with torch {profile['torch']} and {kernels}"


def device_differences(manifest: Mapping[str, Any], profile: Mapping[str, Any]) -> tuple[str, ...]:
    """What of the GPU of a recorded run is another one here: the numbers may be."""
    had = manifest["profile"]
    return tuple(
        f"{name} is {profile.get(name)} here; the run had {had[name]}"
        for name in GPU_FIELDS
        if name in had and profile.get(name) != had[name]
    )


def check_manifest(path: Path, manifest: dict[str, Any], recorded: str) -> None:
    """Compare a manifest with itself and with the digest that its run's ledger begins with.

    Raises:
        IntegrityError: it is not the run's manifest; known differences are named.
    """
    identity, plan = manifest["identity"], manifest["plan"]
    had, planned = {**LATER, **identity}, {**LATER, **plan}
    names = (*IDENTITY, *LATER)
    wrong = [name for name in names if had[name] != counted(name, planned[name])]
    if wrong or manifest["digest"] != recorded or _digest(identity) != recorded:
        raise IntegrityError(
            f"{path} is not the manifest that the run began with",
            expected=f"digest {recorded[:16]}…, which is in the ledger's first line",
            found=f"digest {_digest(identity)[:16]}…"
            + (f"; its plan differs from its identity in {', '.join(wrong)}" if wrong else ""),
            fix="it was altered; use an unaltered copy",
        )


def _digest(identity: dict[str, Any]) -> str:
    return blake3(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def check_trusted(manifest: Mapping[str, Any], run: str | Path) -> None:
    """Check that the task that a manifest names may be imported and called: it is a recipe, or this
    user has made the run.

    Raises:
        JobError: the run folder comes from somewhere else.
    """
    recorded = manifest["source"]
    if ":" not in str(recorded["name"]) or is_own(manifest.get("origin"), recorded):
        return
    raise JobError(
        f"the code that {run} names is not run: the run was not made here by you",
        expected="a run of yours, or one of a recipe",
        found=f"the task {ascii(recorded['name'])[:200]}, and no mark of yours in manifest.json",
        fix="if you trust that code, and what it is called with: --trust, or trust=True",
    )


def recorded_source(
    manifest: dict[str, Any], task: Task | None, run: Path, *, trust: bool
) -> TaskSource:
    """The source of a recorded run's task: `task` if given, else by its name.

    Raises:
        JobError: the task was a live object, which has to be given again; or its code is not to be
            trusted, see `check_trusted`.
    """
    if task is not None:
        return source_of(Job(task=task))
    recorded = manifest["source"]
    if not recorded["importable"]:
        raise JobError(
            f"the task of {run} was handed over as an object: {recorded['name']}",
            expected="the object again",
            fix=f"from Python, pass it: task={recorded['name'].rpartition(':')[2]}(...)",
        )
    if not trust:
        check_trusted(manifest, run)
    return TaskSource(name=recorded["name"], args=recorded["args"])


def check_fitted(run: str | Path, manifest: dict[str, Any], facts: dict[str, Any]) -> None:
    """Check that the data give the same `Task.fitted` as when the model was trained.

    Raises:
        DataError: they do not; the model's inputs or outputs would have another meaning.
    """
    had = manifest.get("fitted", facts["fitted"])  # runs of earlier versions do not say
    if facts["fitted"] != had:
        raise DataError(
            f"the model of {run} was not fitted to these data",
            expected=f"the data that it was trained on, or others that give the same vocabulary, "
            f"ranges and names (digest {had[:16]})",
            found=f"other data (digest {facts['fitted'][:16]})",
            fix="restore the files, or train anew",
        )


def check_sample_order(
    run: str | Path, manifest: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
    """Check that the task draws the samples of a run by the same weights or lengths.

    Raises:
        DataError: it does not: its steps would have other samples.
    """
    had, has = manifest["plan"].get("sample_order", ""), facts["sample_order"]
    if had != has:
        raise DataError(
            f"the training samples of {run} were drawn in another order than they would be now",
            expected=had or "no weights or lengths",
            found=has or "no weights or lengths",
            fix="restore the data, and what Task.sample_weights and sample_lengths return",
        )


def check_resumed(run: str | Path, manifest: dict[str, Any], facts: dict[str, Any]) -> None:
    """Check that a resumed run has the data with which it began, as far as that is recorded.

    Raises:
        DataError: it has others.
    """
    check_fitted(run, manifest, facts)
    check_sample_order(run, manifest, facts)
    plan = manifest["plan"]
    # Data that stay on their hosts are compared when the hosts have joined.
    if not plan.get("holdings") and facts["train_samples"] != plan["train_samples"]:
        raise DataError(
            f"the data of {run} are not those with which it began",
            expected=f"{plan['train_samples']} training samples",
            found=str(facts["train_samples"]),
            fix="restore the files, or start another run",
        )


def differences(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Known differences between a recorded run and what has been loaded now."""
    notes = []
    if facts["code"] != manifest["code"]:
        notes.append("the task's source file is not the one that the run used")
    if facts["probe"] != manifest["probe"]:
        notes.append("this machine does not compute the same bits as the run's")
    profile = manifest["profile"]
    made_by = f"{profile.get('compiler')}, {profile.get('vectors')}"
    if "compiler" in profile and facts.get("compiler", made_by) != made_by:
        notes.append(f"its kernels were compiled by {made_by}; here by {facts['compiler']}")
    had = manifest["plan"]["train_samples"]
    parts = manifest["plan"].get("holdings")  # compared when the hosts have joined
    if facts["train_samples"] != had and not parts:
        notes.append(f"there are {facts['train_samples']} training samples; the run had {had}")
    return tuple(notes)
