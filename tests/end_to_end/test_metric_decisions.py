"""What held-out metrics decide: when a run ends, which checkpoint is kept, the learning rate. The
same for any number of workers, deaths and resumptions, and made again by `lockstep verify`."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lockstep
from lockstep.errors import (
    DataError,
    IntegrityError,
    JobError,
    LockstepError,
    RunFolderError,
    StoppedError,
    TaskError,
)
from lockstep.job.faults import Fault
from lockstep.results.ledger import Ledger, read_ledger
from tests.support import command, metric_task
from tests.support.harmed_runs import Yard, assert_same, events, until, yard
from tests.support.metric_task import EPOCH, Metric
from tests.support.multi_host_runs import (
    Site,
    check_joining_and_leaving,
    ended_well,
    site,
    slow,
)
from tests.support.paced_task import PACE

__all__ = ["site", "slow", "yard"]  # fixtures

SETTINGS: dict[str, Any] = {
    "batch_size": metric_task.BATCH, "data_epochs": 8, "seed": 3, "monitor": "value",
    "shards": 4, "workers": 2,
}  # fmt: skip
STOPS = {**SETTINGS, "stop_patience": 2}
VALUES = [0.875, 0.5, 0.75, 0.625, 0.375]
"""The third and the fourth are no improvement."""
NAME = "tests.support.metric_task:Metric"


def lines_of(folder: str | Path) -> list[dict[str, Any]]:
    return [line.content for line in read_ledger(Path(folder) / "ledger.jsonl")]


def stopped_early(result: lockstep.Result) -> None:
    """It is as it should be of `VALUES` with a patience of 2."""
    assert result.steps == 4 * EPOCH
    assert result.stopped_early == "value has not improved since 0.5 at step 6, in 2 evaluations"
    assert result.best == {
        "step": 6, "metric": "value", "value": 0.5, "checkpoint": "step-00000006"
    }  # fmt: skip
    assert result.baseline == {"loss": 1.5}, "it has its end, though it came early"
    assert [each["metrics"]["value"] for each in result.history] == VALUES[:4]
    (event,) = events(result.folder, "stopped_early")[-1:]
    assert event["reason"] == result.stopped_early
    opened = lockstep.Result.open(result.folder)
    assert (opened.stopped_early, opened.best) == (result.stopped_early, result.best)


# Early stopping.


@pytest.mark.parametrize("scored", [False, True])
def test_it_ends_by_its_metric(yard: Yard, scored: bool) -> None:
    one = yard.run(Metric(VALUES, scored=scored), **{**STOPS, "workers": 1})
    stopped_early(one)
    assert_same(yard.run(Metric(VALUES, scored=scored), **{**STOPS, "workers": 3}), one)
    lines = lines_of(one.folder)
    evaluated = [line for line in lines if "evaluated" in line]
    assert [line["evaluated"] for line in evaluated] == [3, 6, 9, 12]
    assert [float.fromhex(line["metrics"]["value"]) for line in evaluated] == VALUES[:4]
    assert lines[-1]["end"] == 12
    shorter = yard.run(Metric(VALUES), **{**SETTINGS, "data_epochs": 4, "monitor": None})
    assert shorter.fingerprint == one.fingerprint, "the steps are those of any other run"
    assert not any("evaluated" in line for line in lines_of(shorter.folder))


@pytest.mark.parametrize("step", [8, 9, 11])
def test_a_death_about_the_decision(yard: Yard, step: int) -> None:
    fault = Fault(worker_id=1, step=step, phase="update_done")
    stopped_early(yard.check(Metric(VALUES), faults=(fault,), **STOPS))


def test_a_death_in_the_evaluation_that_decides(yard: Yard) -> None:
    fault = Fault(worker_id=0, step=12, phase="evaluate")
    harmed = yard.check(Metric(VALUES), faults=(fault,), **STOPS)
    stopped_early(harmed)
    assert events(harmed.folder, "died")


def poisoned(step: int) -> tuple[Fault, ...]:
    return (Fault(worker_id=-1, step=step, phase="forward", shard=1, repeat=True),)


@pytest.mark.parametrize("step", [5, 6, 7, 10])
@pytest.mark.parametrize("every", [1, 4])
def test_stopped_and_resumed(yard: Yard, step: int, every: int) -> None:
    folder = yard.path()
    with pytest.raises(LockstepError):
        yard.run(Metric(VALUES), out=folder, faults=poisoned(step), checkpoint_steps=every, **STOPS)
    result = lockstep.resume(folder, task=Metric(VALUES), workers=1, quiet=True)
    assert_same(result, yard.undisturbed(Metric(VALUES), **STOPS))
    stopped_early(result)


def test_an_evaluation_that_failed_is_made_when_the_run_is_resumed(yard: Yard) -> None:
    """The state before it was kept; its metric is not left out of the decision."""
    folder = yard.path()
    with pytest.raises(LockstepError, match="the metric is broken"):
        yard.run(Metric(VALUES, broken=2), out=folder, **STOPS)
    assert "step-00000009" in {path.name for path in Path(folder, "checkpoints").iterdir()}
    result = lockstep.resume(folder, task=Metric(VALUES), quiet=True)
    stopped_early(result)
    wanted = yard.undisturbed(Metric(VALUES), **STOPS)
    assert result.fingerprint == wanted.fingerprint
    assert lines_of(folder)[1:-1] == [*lines_of(folder)[1:-1]]
    assert result.history == wanted.history


def test_killed_between_the_decision_and_the_result(yard: Yard) -> None:
    """It ends as soon as it is resumed."""
    wanted = yard.undisturbed(Metric(VALUES), **STOPS)
    folder = Path(yard.path())
    shutil.copytree(wanted.folder, folder)
    (folder / "result.json").unlink()
    (folder / "model.safetensors").unlink()
    ledger = folder / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    result = lockstep.resume(folder, task=Metric(VALUES), quiet=True)
    assert_same(result, wanted)
    stopped_early(result)


def test_several_hosts(site: Site, yard: Yard) -> None:
    settings = {**STOPS, "threads": 1, "quiet": True, "args": {"values": VALUES, "plateau": True}}
    on = site.agents({"b": 1, "c": 1}, 1)
    found = lockstep.run(NAME, on=on, out=yard.path(), **{**settings, "workers": 3})
    assert_same(found, lockstep.run(NAME, out=yard.path(), **settings))
    stopped_early(found)
    ended_well(on)


def test_a_reason_to_stop_at_the_last_step_is_none(yard: Yard) -> None:
    result = yard.run(Metric(VALUES), **{**STOPS, "data_epochs": 4})
    assert (result.steps, result.stopped_early) == (4 * EPOCH, "")
    lockstep.verify(result.folder, task=Metric(VALUES))


def test_commands(yard: Yard, tmp_path: Path) -> None:
    """A run that ends early has ended well."""
    file = Path(metric_task.__file__)
    arguments = "--values=[0.875,0.5,0.75,0.625]", "--monitor=value", "--stop-patience=2"
    found = command.lockstep(
        "run", f"{file}:Metric", *arguments, "--batch-size=20", "--data-epochs=8",
        "--out=run", "--shards=4", "--workers=1", cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "best         value 0.5, step-00000006\n" in found.stdout
    assert "stopped      early: value has not improved since 0.5 at step 6" in found.stdout
    found = command.lockstep("evaluate", "run", "--checkpoint=best", "--json", cwd=tmp_path)
    assert json.loads(found.stdout)["step"] == 6, found.stderr


def test_not_a_number_is_no_improvement(yard: Yard) -> None:
    result = yard.run(Metric([math.nan, 1.0, math.nan]), **STOPS)
    assert result.steps == 4 * EPOCH
    assert result.best is not None
    assert result.best["step"] == 6
    result = yard.run(Metric([math.nan]), **STOPS)
    assert (result.steps, result.best) == (2 * EPOCH, None)
    assert result.stopped_early == "value has not improved at all, in 2 evaluations"
    lockstep.verify(result.folder, task=Metric([math.nan]))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"monitor": "recall"}, JobError, "the setting monitor goes by the metric 'recall'"),
        ({"monitor": ""}, JobError, "monitor has the wrong type"),
        ({"monitor": None}, JobError, "stop_patience is given without monitor"),
        ({"stop_patience": 0}, JobError, "stop_patience is out of range"),
        ({"stop_min_delta": -1.0}, JobError, "stop_min_delta is out of range"),
        ({"stop_min_delta": math.nan}, JobError, "stop_min_delta is out of range"),
        ({"stop_patience": None, "stop_min_delta": 0.1}, JobError, "given without stop_patience"),
        ({"monitor_mode": "most"}, JobError, "monitor_mode is not one of its values"),
        ({"evaluate": False}, DataError, "nothing is evaluated"),
    ],
)
def test_refused_by_name(
    yard: Yard, changes: dict[str, Any], error: type[LockstepError], message: str
) -> None:
    folder = Path(yard.path())
    with pytest.raises(error, match=message):
        yard.run(Metric(VALUES), out=str(folder), **{**STOPS, **changes})
    assert not list(folder.glob("checkpoints/*")), "before the first step"


# The best checkpoint.


def test_the_best_checkpoint_is_kept(yard: Yard, tmp_path: Path) -> None:
    """All others but the newest go."""
    values = [0.875, 0.125, 0.75, 0.625]
    settings = {**SETTINGS, "checkpoint_steps": 1, "keep_checkpoints": 2}
    result = yard.run(Metric(values), **settings)
    assert not result.stopped_early
    assert result.steps == 8 * EPOCH
    assert result.checkpoints == ["step-00000006", "step-00000023", "step-00000024"]
    assert result.best is not None
    assert result.best["checkpoint"] == "step-00000006"
    evaluated = lockstep.evaluate(result.folder, task=Metric(values), checkpoint="best")
    assert (evaluated.step, evaluated.metrics) == (6, result.history[1]["metrics"])
    assert lockstep.evaluate(result.folder, task=Metric(values)).step == 24
    by_step = lockstep.evaluate(result.folder, task=Metric(values), checkpoint="23")
    assert by_step.step == 23
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"x": [0.5] * 12}) + "\n")
    rows = {}
    for name in ("best", "step-00000006", "step-00000024", None):
        out = tmp_path / f"{name}.jsonl"
        lockstep.predict(
            result.folder, records, out=out, task=Metric(values), workers=1, checkpoint=name
        )
        rows[name] = out.read_text()
    assert rows["best"] == rows["step-00000006"]
    assert rows[None] == rows["step-00000024"] != rows["best"]
    shorter = yard.run(Metric(values), **{**SETTINGS, "data_epochs": 2, "monitor": None})
    for name, weight in shorter.model().state_dict().items():
        assert torch.equal(result.model("best").state_dict()[name], weight)
    with pytest.raises(RunFolderError, match="has no checkpoint step-00000007"):
        result.model("step-00000007")
    with pytest.raises(RunFolderError, match="has no best checkpoint: the run went by no metric"):
        shorter.model("best")
    best = result.folder / "checkpoints" / "step-00000006" / "model.safetensors"
    best.write_bytes(best.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError, match=r"step-00000006.*is not what was written"):
        lockstep.evaluate(result.folder, task=Metric(values), checkpoint="best")


def test_the_best_checkpoint_outlives_a_resumption(yard: Yard) -> None:
    values = [0.875, 0.125, 0.75, 0.625]
    settings = {**SETTINGS, "checkpoint_steps": 1, "keep_checkpoints": 2}
    folder = yard.path()
    with pytest.raises(LockstepError):
        yard.run(Metric(values), out=folder, faults=poisoned(14), **settings)
    result = lockstep.resume(folder, task=Metric(values), workers=2, quiet=True)
    assert result.checkpoints == ["step-00000006", "step-00000023", "step-00000024"]
    assert_same(result, yard.undisturbed(Metric(values), **SETTINGS))


def test_large_values_can_be_good(yard: Yard) -> None:
    result = yard.run(Metric([0.5, 0.9, 0.8, 0.7]), **{**STOPS, "monitor_mode": "max"})
    assert result.best is not None
    assert (result.steps, result.best["step"]) == (4 * EPOCH, 2 * EPOCH)


# Schedules that wait for a metric.


def plain_loop(task: Metric, values: Sequence[float], epochs: int) -> list[float]:
    """The learning rates of a loop of PyTorch's, by data epoch."""
    optimizer = task.optimizer(lockstep.Parameters(task.model().named_parameters()))
    schedule: Any = task.scheduler(optimizer)
    rates = []
    for epoch in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(values[min(epoch, len(values) - 1)])
    return rates


class Stepwise(Metric):
    """The same, with the learning rates of a list instead of a plateau's."""

    def __init__(self, values: list[float], rates: list[float]) -> None:
        super().__init__(values)
        self.rates = rates

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.rates[min(step // EPOCH, len(self.rates) - 1)] / 0.1
        )


PLATEAU = {**SETTINGS, "monitor": None}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_plateau_halves_the_learning_rate(yard: Yard, workers: int) -> None:
    """The steps are those of the same learning rates, given in another way."""
    task = Metric(VALUES, plateau=True)
    rates = plain_loop(task, VALUES, 8)
    assert rates == [0.1, 0.1, 0.1, 0.05, 0.025, 0.025, 0.0125, 0.00625]
    result = yard.run(task, **{**PLATEAU, "workers": workers})
    given = yard.undisturbed(Stepwise(VALUES, rates), **PLATEAU)
    assert result.fingerprint == given.fingerprint
    steps = [line for line in lines_of(result.folder) if "step" in line]
    assert [{**line, "hash": ""} for line in steps] == [
        {**line, "hash": ""} for line in lines_of(given.folder) if "step" in line
    ]
    assert_same(result, yard.undisturbed(task, **PLATEAU))
    assert [line["evaluated"] for line in lines_of(result.folder) if "evaluated" in line] == list(
        range(3, 25, 3)
    )


@pytest.mark.parametrize(
    ("step", "phase"),
    [
        (8, "update_done"),
        (9, "forward"),
        (9, "update_begin"),
        (10, "update_done"),
        (12, "evaluate"),
    ],
)
def test_a_plateau_and_deaths(yard: Yard, step: int, phase: str) -> None:
    """Steps from before the evaluation that are computed again have the learning rate of before."""
    # Who has no shard in a step never comes to a forward pass.
    for worker_id in (-1,) if phase == "forward" else (0, 1):
        fault = Fault(worker_id=worker_id, step=step, phase=phase)
        harmed = yard.check(Metric(VALUES, plateau=True), faults=(fault,), **PLATEAU)
        assert events(harmed.folder, "died")


@pytest.mark.parametrize("step", [5, 9, 11, 13])
def test_a_plateau_is_resumed(yard: Yard, step: int) -> None:
    task = Metric(VALUES, plateau=True)
    folder = yard.path()
    with pytest.raises(LockstepError):
        yard.run(task, out=folder, faults=poisoned(step), checkpoint_steps=4, **PLATEAU)
    result = lockstep.resume(folder, task=task, workers=3, quiet=True)
    assert_same(result, yard.undisturbed(task, **PLATEAU))


def test_a_plateau_that_is_purely_checked(yard: Yard) -> None:
    class Reads(Metric):
        """Its loss depends on the learning rate."""

        def optimizer(self, params: Any) -> Any:
            self.made = super().optimizer(params)
            return self.made

        def loss(self, model: Any, batch: Any) -> Any:
            return super().loss(model, batch) * (1 + self.made.param_groups[0]["lr"])

    one = yard.run(Reads(VALUES, plateau=True), purity=1.0, **{**PLATEAU, "data_epochs": 5})
    assert_same(
        yard.run(Reads(VALUES, plateau=True), purity=0.0, **{**PLATEAU, "data_epochs": 5}), one
    )


def test_a_plateau_that_cannot_be(yard: Yard) -> None:
    class Lost(Metric):
        scheduler_metric = "recall"

    class Alone(Metric):
        def eval_data(self) -> None:
            return None

    with pytest.raises(JobError, match=r"Task.scheduler_metric goes by the metric 'recall'"):
        yard.run(Lost(VALUES, plateau=True), **PLATEAU)
    for task, changes in (
        (Alone(VALUES, plateau=True), {}),
        (Metric(VALUES, plateau=True), {"evaluate": False}),
    ):
        with pytest.raises(TaskError, match="nothing is evaluated"):
            yard.run(task, **PLATEAU, **changes)
    with pytest.raises(TaskError, match="a schedule that waits for a metric cannot be used here"):
        yard.run(Metric(VALUES, plateau=True), **{**PLATEAU, "local_steps": 2, "batch_size": 10})


def test_a_host_dies_on_a_plateau(site: Site, yard: Yard) -> None:
    settings = {**PLATEAU, "threads": 1, "args": {"values": VALUES, "plateau": True}}
    on = site.agents({"b": 1, "c": 1}, 1)
    fault = Fault(kind="host", host="c", worker_id=-1, step=10, phase="update_begin")
    found = yard.run(NAME, on=on, faults=(fault,), **{**settings, "workers": 3})
    assert_same(found, yard.undisturbed(NAME, **settings))
    assert events(found.folder, "host_lost")
    ended_well(on, "c")


@pytest.mark.long
@pytest.mark.usefixtures("slow")
def test_hosts_that_join_know_the_metrics(site: Site) -> None:
    check_joining_and_leaving(
        site, {"b": 1, "c": 1}, "d", "c",
        task="tests.support.paced_task:Waiting", monitor="accuracy", monitor_mode="max",
    )  # fmt: skip


@pytest.mark.parametrize("step", [4, 40])
def test_stopped_on_request_and_resumed(
    yard: Yard, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = "tests.support.paced_task:Waiting"
    settings: dict[str, Any] = {
        "batch_size": 24, "seed": 5, "steps": 120, "monitor": "accuracy", "monitor_mode": "max",
        "stop_patience": 50, "workers": 2,
    }  # fmt: skip
    folder = yard.path()
    monkeypatch.setenv(PACE, "0.01")
    run = lockstep.start(task, out=folder, quiet=True, shards=6, threads=1, **settings)
    until(lambda: len(recorded_steps(folder)) > step, 60, f"step {step}")
    run.stop()
    with pytest.raises(StoppedError):
        run.result(60)
    monkeypatch.setenv(PACE, "0")
    resumed = lockstep.resume(folder, workers=1, quiet=True)
    assert_same(resumed, yard.undisturbed(task, **settings))
    assert resumed.best == yard.undisturbed(task, **settings).best


def test_scaled_up_and_down(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that come later know the metrics of before."""
    task, folder = "tests.support.paced_task:Waiting", yard.path()
    settings: dict[str, Any] = {"batch_size": 24, "seed": 5, "steps": 100, "monitor": "accuracy"}
    monkeypatch.setenv(PACE, "0.01")
    run = lockstep.start(task, out=folder, quiet=True, workers=1, shards=6, threads=1, **settings)
    until(lambda: len(recorded_steps(folder)) > 10, 60, "step 10")
    run.scale(3)
    until(lambda: len(recorded_steps(folder)) > 40, 60, "step 40")
    run.scale(2)
    result = run.result(60)
    monkeypatch.setenv(PACE, "0")
    assert_same(result, yard.undisturbed(task, **settings))


DIVISIONS: list[Any] = [
    {"ownership": "servers", "servers": ["master"]},  # which sees no loss of its own
    pytest.param({"ownership": "servers", "servers": ["c"]}, marks=pytest.mark.long),
    pytest.param({"ownership": "sharded"}, marks=pytest.mark.long),
    pytest.param({"audit": 1.0}, marks=pytest.mark.long),
]


@pytest.mark.parametrize("division", DIVISIONS)
def test_whoever_updates_what(site: Site, yard: Yard, division: dict[str, Any]) -> None:
    task = "tests.support.paced_task:Waiting"
    settings = {"batch_size": 24, "seed": 5, "steps": 20, "monitor": "loss", "stop_patience": 2}
    on = site.agents({"b": 1, "c": 1}, 1)
    found = yard.run(task, on=on, **{**settings, **division})
    wanted = yard.undisturbed(task, **settings)
    assert_same(found, wanted)
    assert found.best == wanted.best
    ended_well(on)


@pytest.mark.long
def test_resumed_on_hosts(site: Site, yard: Yard) -> None:
    folder, settings = yard.path(), {**PLATEAU, "args": {"values": VALUES, "plateau": True}}
    with pytest.raises(LockstepError):
        yard.run(NAME, out=folder, faults=poisoned(11), **settings)
    on = site.agents({"b": 1, "c": 1}, 1)
    found = lockstep.resume(folder, on=on, workers=3, quiet=True)
    assert_same(found, yard.undisturbed(NAME, **settings))
    ended_well(on)


class Cautious(torch.optim.SGD):
    """Of a class that is not known: one worker updates everything."""


class Undivided(Metric):
    def optimizer(self, params: Any) -> Any:
        return Cautious(params, lr=0.1, momentum=0.9)


def test_a_plateau_of_an_undivided_optimizer(yard: Yard) -> None:
    task = Undivided(VALUES, plateau=True)
    fault = Fault(worker_id=0, step=10, phase="update_done")
    result = yard.check(task, faults=(fault,), **PLATEAU)
    losses = [line["loss"] for line in lines_of(result.folder) if "step" in line]
    plain = yard.undisturbed(Metric(VALUES, plateau=True), **PLATEAU)
    assert losses == [line["loss"] for line in lines_of(plain.folder) if "step" in line]


def test_no_step_at_all(yard: Yard) -> None:
    settings = {**STOPS, "data_epochs": None, "steps": 0}
    result = yard.run(Metric(VALUES, plateau=True), **settings)
    assert (result.steps, result.stopped_early) == (0, "")
    assert lockstep.verify(result.folder, task=Metric(VALUES, plateau=True)).final


def recorded_steps(folder: str) -> list[bytes]:
    """The lines of a ledger that is being written."""
    path = Path(folder, "ledger.jsonl")
    return path.read_bytes().splitlines() if path.exists() else []


# Verify.


@pytest.mark.parametrize("plateau", [False, True])
def test_verified(yard: Yard, plateau: bool) -> None:
    task = Metric(VALUES, plateau=plateau)
    result = yard.undisturbed(task, **STOPS)
    found = lockstep.verify(result.folder, task=task, workers=1)
    assert (found.first, found.last, found.final) == (0, 12, True)
    part = lockstep.verify(result.folder, task=task, steps=(7, 11))
    assert (part.start, part.last) == ("step-00000006", 11)


def test_what_verify_finds(yard: Yard) -> None:
    """Another metric than was recorded, and decisions that do not follow from what was."""
    result = yard.undisturbed(Metric(VALUES), **STOPS)
    other = [0.875, 0.5, 0.8125, 0.625]
    with pytest.raises(IntegrityError, match="the replay's evaluation after step 9 differs"):
        lockstep.verify(result.folder, task=Metric(other))

    def altered(change: Any) -> Path:
        """A copy whose lines are changed and chained anew, as a forger would."""
        folder = Path(yard.path())
        shutil.copytree(result.folder, folder)
        bodies = [line.body for line in read_ledger(folder / "ledger.jsonl")]
        (folder / "ledger.jsonl").unlink()
        ledger = Ledger(folder / "ledger.jsonl")
        for body in change(bodies):
            ledger._append(body)
        ledger.flush()
        ledger.close()
        return folder

    def better(bodies: list[str]) -> list[str]:
        return [each.replace((0.625).hex(), (0.25).hex()) for each in bodies]

    def left_out(bodies: list[str]) -> list[str]:
        return [each for each in bodies if '"evaluated":9' not in each]

    def moved(bodies: list[str]) -> list[str]:
        changed = copy.copy(bodies)
        place = next(n for n, each in enumerate(bodies) if '"evaluated":9' in each)
        changed[place], changed[place - 1] = changed[place - 1], changed[place]
        return changed

    for change, message in (
        (better, "does not end where its metrics say"),
        (left_out, "does not end where its metrics say"),
        (moved, "an evaluation in the wrong place"),
    ):
        with pytest.raises(IntegrityError, match=message):
            lockstep.verify(altered(change), task=Metric(VALUES))
    folder = altered(lambda bodies: bodies)
    for field, value, message in (
        ("stopped_early", "", "why it ended"),
        ("best", {**result.best, "step": 9}, "which state is the best"),  # type: ignore[dict-item]
    ):
        content = json.loads((result.folder / "result.json").read_text())
        (folder / "result.json").write_text(json.dumps({**content, field: value}))
        with pytest.raises(IntegrityError, match=message):
            lockstep.verify(folder, task=Metric(VALUES))
