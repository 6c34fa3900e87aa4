"""What the events tell beside the losses: learning rate, memory, and what the plan predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from lockstep.job.faults import Fault
from lockstep.results.run_reader import RunReader
from tests.support.drawing_task import Weighted
from tests.support.harmed_runs import Yard, events, ledger, yard

__all__ = ["yard"]  # a fixture

SETTINGS: dict[str, Any] = {"batch_size": 15, "steps": 12, "shards": 3}


class Halved(Weighted):
    """Its learning rate is halved after each fourth step."""

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return StepLR(optimizer, 4, 0.5)


@pytest.mark.parametrize(
    "faults", [(), (Fault(kind="kill", step=6, phase="barrier", worker_id=0),)]
)
def test_the_learning_rate_of_the_last_step(yard: Yard, faults: Any) -> None:
    """Also where the worker that tells it dies; the ledger does not depend on it."""
    found = yard.run(Halved(), workers=2, faults=faults, **SETTINGS)
    told = {event["step"]: event["lr"] for event in events(found.folder, "progressed")}
    assert told[12] == pytest.approx(0.1 * 0.5**2)
    assert b"lr" not in ledger(found.folder)


def test_with_local_steps_none_is_told(yard: Yard) -> None:
    found = yard.run(Halved(), workers=2, **{**SETTINGS, "steps": 3, "local_steps": 2})
    assert all("lr" not in event for event in events(found.folder, "progressed"))


def test_memory_is_told_of_each_worker(yard: Yard) -> None:
    found = yard.run(Weighted(), workers=2, **SETTINGS)
    told = [event["memory"] for event in events(found.folder, "timed")]
    assert {worker for memory in told for worker in memory} <= {"0", "1"}
    assert all(1 << 20 < size < 1 << 32 for memory in told for size in memory.values())


def test_what_the_plan_predicts_is_told(yard: Yard) -> None:
    """Where the number of workers is open."""
    long = {**SETTINGS, "steps": 1500}
    found = yard.run(Weighted(), workers=None, **long)
    reader = RunReader(found.folder)
    reader.refresh()
    predicted = reader.summary("x")["predicted"]
    (planned,) = events(found.folder, "plan")
    assert predicted["rate"] == pytest.approx(15 / planned["predicted"])
    assert predicted["workers"] == found.workers
    asked = yard.run(Weighted(), workers=2, **SETTINGS)
    assert not events(asked.folder, "plan")
