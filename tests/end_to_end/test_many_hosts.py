"""Several hosts, in processes that talk over loopback: the bits of one, whatever dies or joins."""

from __future__ import annotations

import itertools
import os
import signal
from typing import Any

import pytest

import lockstep
from lockstep.errors import (
    IntegrityError,
    JobError,
    LockstepError,
    NonFiniteError,
    RefusedError,
    StoppedError,
)
from lockstep.job.faults import PHASES, Fault
from tests.support.harmed_runs import assert_same, events, yard
from tests.support.multi_host_runs import PACED, TASK, WAIT, Live, Site, ended_well, site, slow
from tests.support.paced_task import PACE
from tests.zoo import ZOO

__all__ = ["site", "slow", "yard"]  # fixtures

IN_STEP = tuple(phase for phase in (*PHASES, "exchange") if phase != "evaluate")


# The same bits.


@pytest.mark.parametrize(
    ("name", "others", "here"),
    [
        pytest.param("cnn", {"b": 2}, 2, marks=pytest.mark.long),
        ("mixture", {"b": 1, "c": 1}, 2),  # parameters without gradients in some steps
        pytest.param("clip", {"b": 1, "c": 1, "d": 1}, 1, marks=pytest.mark.long),
        pytest.param("bf16", {"b": 3, "c": 1}, 1, marks=pytest.mark.long),
        pytest.param("transformer", {"b": 2, "c": 1}, 1, marks=pytest.mark.long),
        pytest.param("muon", {"b": 2}, 1, marks=pytest.mark.long),
        pytest.param("augmented", {"b": 2}, 1, marks=pytest.mark.long),
        pytest.param("embedding", {"b": 1, "c": 3}, 1, marks=pytest.mark.long),
        pytest.param("channels-last", {"b": 1, "c": 1}, 1, marks=pytest.mark.long),
        pytest.param("buffers", {"b": 2, "c": 2}, 2, marks=pytest.mark.long),
    ],
)
def test_same_bits(site: Site, name: str, others: dict[str, int], here: int) -> None:
    on = site.agents(others, here)
    site.check(name, on)
    ended_well(on)


@pytest.mark.long
@pytest.mark.parametrize("use", ["once", "two losses"])
def test_sparse_gradients_between_hosts(site: Site, use: str, run_folders: Any) -> None:
    """Only touched rows travel; a gradient that changes after it was sent is sent again."""
    settings: dict[str, Any] = {
        "args": {"optimizer": "SparseAdam", "use": use}, "batch_size": 48, "steps": 8, "seed": 3,
        "shards": 4, "threads": 1, "quiet": True,
    }  # fmt: skip
    on = site.agents({"b": 1, "c": 1}, 2)
    task = "tests.collectives.test_sparse_gradients:Sparse"
    found = lockstep.run(task, on=on, workers=4, out=run_folders(), **settings)
    wanted = lockstep.run(task, workers=1, out=run_folders(), **settings)
    assert_same(found, wanted)
    ended_well(on)


# Deaths.


@pytest.mark.parametrize(
    "others",
    [
        pytest.param({"b": 2}, id="2x2", marks=pytest.mark.long),
        pytest.param({"b": 1, "c": 1}, id="2+1+1"),
        pytest.param({"b": 1, "c": 1, "d": 1}, id="4x1", marks=pytest.mark.long),
    ],
)
def test_a_host_dies(site: Site, others: dict[str, int]) -> None:
    """Four workers on two, three and four hosts, of which one dies in the middle of an update."""
    on = site.agents(others, 4 - sum(others.values()))
    fault = Fault(worker_id=0, host="b", step=5, phase="update_end", kind="host")
    found = site.check("cnn", on, faults=(fault,))
    (lost,) = events(found.folder, "host_lost")
    assert lost["host"] == "b"
    (recovery,) = [each for each in found.recoveries if each["host"] == "b"]
    assert recovery["recovery_ms"] >= recovery["regroup_ms"] > 0
    ended_well(on, "b")


PAIRS = list(zip(IN_STEP[::2], [*IN_STEP[1::2], "slot"], strict=False))


@pytest.mark.parametrize(
    "phases", [PAIRS[0], *(pytest.param(p, marks=pytest.mark.long) for p in PAIRS[1:])], ids=str
)
def test_hosts_die_in_every_phase(site: Site, phases: tuple[str, str]) -> None:
    on = site.agents({"b": 1, "c": 1}, 1)
    faults = tuple(
        Fault(worker_id=-1, host=host, step=step, phase=phase, kind="host")
        for host, step, phase in zip("bc", (5, 12), phases, strict=True)
    )
    found = site.check("channels-last", on, steps=20, faults=faults)
    assert [event["host"] for event in events(found.folder, "host_lost")] == ["b", "c"]
    ended_well(on, "b", "c")


@pytest.mark.long
def test_workers_die_in_every_phase(site: Site) -> None:
    """On either host; what is torn on one is copied from the other."""
    on = site.agents({"b": 2}, 1)
    faults = tuple(
        Fault(worker_id=-1, host=("b", "master")[place % 2], step=4 * place + 4, phase=phase)
        for place, phase in enumerate(IN_STEP)
    )
    found = site.check("cnn", on, steps=4 * len(faults) + 8, faults=faults)
    died = {(event["host"], event["step"]) for event in events(found.folder, "died")}
    assert died == {(fault.host, fault.step) for fault in faults}
    assert not events(found.folder, "host_lost")
    ended_well(on)


@pytest.mark.long
def test_every_host_is_interrupted_in_the_same_update(site: Site) -> None:
    """Nobody has a whole state: all go back to their bases."""
    on = site.agents({"b": 1, "c": 1}, 1)
    faults = tuple(
        Fault(worker_id=0, step=step, phase=phase)
        for step, phase in ((6, "update_end"), (13, "update_begin"), (20, "update_done"))
    )
    found = site.check("channels-last", on, steps=30, faults=faults)
    died = [(event["host"], event["step"]) for event in events(found.folder, "died")]
    assert sorted(died) == sorted(itertools.product(("b", "c", "master"), (6, 13, 20)))
    ended_well(on)


@pytest.mark.long
def test_flipped_bits_on_another_host_are_put_right(site: Site) -> None:
    """A gradient before it is sent; a parameter by a copy from the host that has it right."""
    on = site.agents({"b": 2}, 1)
    faults = (
        Fault(worker_id=-1, host="b", step=4, phase="slot", kind="flip"),
        Fault(worker_id=0, host="b", step=8, phase="barrier", kind="flip"),
    )
    found = site.check("cnn", on, steps=16, faults=faults, audit=1.0)
    corrupt = events(found.folder, "corrupt")
    assert [(event["host"], event["step"]) for event in corrupt] == [("b", 4), ("b", 8)]
    assert "shard" in corrupt[0]
    assert "tensor" in corrupt[1]
    ended_well(on)


# Joining, leaving, falling silent.


@pytest.mark.long
def test_hosts_join_and_are_killed_and_stop_answering(site: Site, slow: None) -> None:
    on = site.agents({"b": 1}, 1)
    changes = {"steps": 900, "host_seconds": 1.5}
    live = Live(site, on, **changes)
    live.await_step(40)
    on.start("c", 2)
    live.await_host("c")
    on.signal("b")
    live.await_loss("b")
    on.start("d", 1)
    live.await_host("d")
    on.signal("c", signal.SIGSTOP)
    assert "no sign of life" in live.await_loss("c")["why"]
    on.signal("c")
    live.run.stop()
    with pytest.raises(StoppedError):
        live.run.result(WAIT)
    ended_well(on, "b", "c")
    os.environ[PACE] = "0"
    resumed = lockstep.resume(live.folder, quiet=True)
    assert_same(resumed, site.yard.undisturbed(TASK, **PACED, **changes))


# Who may not take part, and what goes wrong.


def test_hosts_that_differ_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    on = site.agents({"b": 1}, 1)
    with pytest.raises(RefusedError, match="host b") as raised:
        lockstep.run(
            "tests.support.agents_on_loopback:Differs", args={"folder": str(on.cluster.folder)},
            on=on, workers=2, quiet=True, out=site.yard.path(), batch_size=8, steps=4,
        )  # fmt: skip
    assert "data is" in raised.value.found
    assert "data is" in on.log("b") or on.wait()["b"] != 0


@pytest.mark.long
def test_a_host_that_differs_cannot_join(site: Site, slow: None) -> None:
    """The job goes on."""
    on = site.agents({"b": 1}, 1)
    live = Live(site, on, steps=5000)
    live.await_step(4)
    on.start("c", 1, environment={"ATEN_CPU_CAPABILITY": "default"})
    refused = live.wait_for(lambda e: e["event"] == "refused", "a refusal")
    assert refused["host"] == "c"
    assert "probe is" in refused["why"]
    live.run.stop()
    with pytest.raises(StoppedError):
        live.run.result(WAIT)
    assert on.wait()["c"] == 1
    assert "probe is" in on.log("c")


def test_tasks_that_do_not_travel(site: Site) -> None:
    on = site.agents({"b": 1}, 1)
    with pytest.raises(JobError, match="cannot be sent to other hosts"):
        lockstep.run(ZOO["mlp"].task, on=on, workers=2, quiet=True, out=site.yard.path(), steps=2)
    assert not on.processes


@pytest.mark.long
def test_too_few_workers(site: Site) -> None:
    on = site.agents({"b": 1, "c": 1}, 1)
    with pytest.raises(JobError, match="too few workers"):
        lockstep.run(
            "tests.zoo:named", args={"name": "mlp"}, on=on, workers=2, quiet=True,
            out=site.yard.path(), steps=2, batch_size=8,
        )  # fmt: skip


def test_an_error_on_another_host_ends_the_job(site: Site) -> None:
    on = site.agents({"b": 1}, 1)
    with pytest.raises(NonFiniteError, match="host b") as raised:
        site.run("turns-nan", on, steps=12)
    assert isinstance(raised.value, LockstepError)
    assert "step 2, shard 4" in str(raised.value)
    codes = on.wait()
    assert codes["b"] == 1, on.log("b")


@pytest.mark.long
def test_hosts_that_drift_apart_are_found(site: Site) -> None:
    """A bit that flips in one host's memory, where no audit looks."""
    on = site.agents({"b": 1}, 1)
    fault = Fault(worker_id=0, host="b", step=30, phase="barrier", kind="flip")
    with pytest.raises(IntegrityError, match="host b and host master") as raised:
        site.run("mlp", on, steps=400, faults=(fault,))
    assert "step 64" in str(raised.value)


# The master.


@pytest.mark.long
def test_the_master_dies_and_the_run_is_resumed_on_other_hosts(site: Site, slow: None) -> None:
    """A run that stopped on two hosts goes on on three."""
    changes = {"steps": 400, "checkpoint_steps": 20}
    live = Live(site, site.agents({"b": 1}, 1), **changes)
    live.await_step(40)
    live.run.stop()
    with pytest.raises(StoppedError):
        live.run.result(WAIT)
    ended_well(site.opened[-1])
    os.environ[PACE] = "0"
    on = site.agents({"x": 1, "y": 1}, 1)
    found = lockstep.resume(live.folder, on=on, quiet=True)
    assert_same(found, site.yard.undisturbed(TASK, **PACED, **changes))
    ended_well(on)
