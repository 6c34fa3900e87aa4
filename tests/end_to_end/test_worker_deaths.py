"""Workers die and hang in every phase of a step, alone and together: not a bit changes."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

import lockstep
from lockstep.agent import worker_group as worker_group
from lockstep.agent.recovery import POISON_DEATHS
from lockstep.data.sample_order import SampleOrder
from lockstep.errors import PoisonError
from lockstep.job.faults import PHASES, Fault
from lockstep.planning.sampling import Sampling
from tests.support.harmed_runs import HOW, Yard, assert_same, assert_struck, events, yard
from tests.zoo import ZOO, Entry
from tests.zoo.vectors import SAMPLES

__all__ = ["yard"]  # a fixture

APART = 5
"""Steps between two deaths, and between two evaluations."""


STEPS = APART * (len(PHASES) + 1)


def settings_of(name: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    entry: Entry = ZOO[name]
    return entry.task, {**entry.settings(), "steps": STEPS, **changes}


def in_every_phase(kinds: tuple[str, ...]) -> tuple[Fault, ...]:
    """A death in each phase, one after another."""
    return tuple(
        Fault(worker_id=-1, step=APART * (place + 1), phase=phase, kind=kind)  # type: ignore[arg-type]
        for place, (phase, kind) in enumerate(zip(PHASES, itertools.cycle(kinds), strict=False))
    )


# One at a time.


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("cnn", ("kill", "segfault", "exit")),
        pytest.param("transformer", ("segfault", "exit", "kill"), marks=pytest.mark.long),
        pytest.param("by-epoch", ("exit", "kill", "segfault"), marks=pytest.mark.long),
        pytest.param(  # with clip_grad_norm
            "channels-last", ("kill", "segfault", "exit"), marks=pytest.mark.long
        ),
        pytest.param("wide-branches", ("kill", "exit", "segfault"), marks=pytest.mark.long),
    ],
)
def test_a_death_in_every_phase(name: str, kinds: tuple[str, ...], yard: Yard) -> None:
    faults = in_every_phase(kinds)
    task, settings = settings_of(name)
    result = yard.check(task, faults=faults, **settings)
    assert_struck(result.folder, faults)
    check_recoveries(result, at_least=len(faults))


def check_recoveries(result: lockstep.Result, at_least: int) -> None:
    """Every recovery tells what happened, and what it took."""
    assert len(result.recoveries) >= at_least
    for recovery in result.recoveries:
        assert recovery["how"] in HOW.values()
        assert 0 <= recovery["regroup_ms"] <= recovery["recovery_ms"]
        assert recovery["detection_ms"] >= 0
    stored = json.loads((result.folder / "result.json").read_text())
    assert stored["recoveries"] == result.recoveries
    formed = events(result.folder, "formed")
    assert len(formed[-1]["seats"]) == result.workers or result.workers == 1


SHARD = {"load": 0, "forward": 1, "backward": 2, "slot": 3}
"""Different shards: three deaths at the same one would make it a poisoned one."""
TOGETHER = ("barrier", "reduce", "update_begin", "update_end", "update_done", "commit")
"""Phases in which workers meet, and in which blocks change."""


@pytest.mark.parametrize("name", ["cnn", pytest.param("channels-last", marks=pytest.mark.long)])
def test_the_only_worker_dies_in_every_phase_of_one_step(name: str, yard: Yard) -> None:
    """Each successor goes on where the last one died; the state is never that of a half step."""
    faults = [
        Fault(worker_id=0, step=7, phase=phase, shard=SHARD.get(phase))
        for phase in (*SHARD, *TOGETHER)
    ]
    faults += [
        Fault(worker_id=0, step=8, phase="audit"),
        Fault(worker_id=0, step=10, phase="evaluate"),
    ]
    task, settings = settings_of(name)
    result = yard.check(task, faults=tuple(faults), workers=1, **settings)
    assert len(events(result.folder, "died")) == len(faults)


# Together.


def test_two_and_all_at_once(yard: Yard) -> None:
    """Three of three at the barrier leave nobody who could go on: successors do."""
    two = tuple(Fault(worker_id=worker_id, step=10, phase="update_end") for worker_id in (0, 2))
    three = tuple(Fault(worker_id=worker_id, step=60, phase="barrier") for worker_id in (0, 1, 2))
    task, settings = settings_of("transformer")
    result = yard.check(task, faults=two + three, **settings)
    deaths = [event["step"] for event in events(result.folder, "died")]
    assert deaths == [10] * 2 + [60] * 3
    assert len(result.recoveries) == 5


@pytest.mark.parametrize("name", ["channels-last", "wide-branches"])
def test_deaths_while_a_recovery_is_under_way(name: str, yard: Yard) -> None:
    """In one step, the workers of all seats die in each phase, and so do their successors."""
    faults = tuple(
        Fault(worker_id=worker_id, step=20, phase=phase)
        for phase in TOGETHER
        for worker_id in (0, 1, 2)
    )
    task, settings = settings_of(name)
    result = yard.check(task, faults=faults, **settings)
    assert len(events(result.folder, "died")) > len(TOGETHER)


# Going back to a state that is many steps old.


@pytest.mark.parametrize(
    "name",
    [
        "cnn",
        "clip",
        "by-epoch",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("onecycle", "embedding")),
    ],
)
def test_steps_since_the_snapshot_are_computed_again(
    name: str, yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedules, buffers and optimizer state go back with the parameters, on survivors and on
    successors alike; what was recorded is not recorded twice."""
    monkeypatch.setattr(worker_group, "steps_between", lambda *_: 1_000_000)
    entry: Entry = ZOO[name]
    settings = entry.settings()
    last = settings["steps"] - 2
    faults = (
        Fault(worker_id=-1, step=last - 4, phase="update_end"),
        Fault(worker_id=0, step=last, phase="update_done"),
    )
    result = yard.check(entry.task, faults=faults, **settings)
    first, *_, second = sorted(result.recoveries, key=lambda recovery: int(recovery["step"]))
    assert first["steps_back"] == first["step"] == last - 4
    assert second["step"] == last


# Hanging.


def test_stopped_and_endless(yard: Yard) -> None:
    """Workers that live and do nothing are replaced; the event tells where they were."""
    stop = Fault(
        worker_id=-1, step=20, phase="backward", kind="stop"
    )  # others may take one's shards
    loop = Fault(worker_id=2, step=60, phase="update_begin", kind="loop")
    task, settings = settings_of("transformer", stall_seconds=0.5)
    result = yard.check(task, faults=(stop, loop), **settings)
    stalls = {event["step"]: event for event in events(result.folder, "stalled")}
    stopped, endless = stalls[20], stalls[60]
    assert stopped["phase"] == "compute"
    assert stopped["state"].startswith("T")
    assert "update" not in stopped["stack"]
    assert endless["phase"] == "update"
    assert "owner.py" in endless["stack"]
    assert "in _strike" in endless["stack"]
    for recovery in result.recoveries:
        assert recovery["how"] == HOW["kill"]
        assert recovery["detection_ms"] > 400


# A shard that kills.


def test_a_poisoned_shard_stops_the_run(yard: Yard) -> None:
    """It is named with its samples; the state before is kept, and without the poison goes on."""
    poison = Fault(worker_id=-1, step=13, phase="forward", shard=4, repeat=True)
    task, settings = settings_of("cnn")
    folder = yard.path()
    with pytest.raises(PoisonError) as caught:
        yard.run(task, faults=(poison,), checkpoint_steps=5, out=folder, **settings)
    sampling = Sampling(
        samples=SAMPLES, batch_size=settings["batch_size"], shards=6, seed=settings["seed"]
    )
    samples = SampleOrder(sampling).indices(13, 4).tolist()
    assert "shard 4 of step 13" in caught.value.what
    assert ", ".join(map(str, samples)) in caught.value.found
    assert len(events(folder, "died")) == POISON_DEATHS
    resumed = lockstep.resume(folder, task=task, workers=2, quiet=True)
    assert [event["step"] for event in events(folder, "resumed")] == [13]
    assert_same(resumed, yard.undisturbed(task, **settings))
