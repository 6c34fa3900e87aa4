"""Teams: workers that compute a shard together. The bits depend neither on them nor on deaths."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lockstep
from lockstep.errors import IntegrityError, JobError
from lockstep.job.faults import Fault
from lockstep.state.fault_injection import SLOW_SECONDS
from tests.end_to_end.test_slices import task_of
from tests.support import command
from tests.support.file_tree import ROOT
from tests.support.harmed_runs import Yard, assert_same, assert_struck, events, until, yard
from tests.support.multi_host_runs import Site, site
from tests.support.paced_task import PACE
from tests.support.sliced_tasks import Mlp, Table

__all__ = ["site", "yard"]  # fixtures

SETTINGS: dict[str, Any] = {"shards": 3, "batch_size": 12, "steps": 4}
QUICK: dict[str, Any] = {"purity": 0.0, "trace": "never"}
"""What is tested once is not paid for in every run."""


def alone(yard: Yard, name: str, slices: int, **settings: Any) -> lockstep.Result:
    """The run of one worker."""
    return yard.run(task_of(name, 0.2), workers=1, slices=slices, **QUICK, **SETTINGS, **settings)


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("mlp", 2),
        pytest.param("mlp", 4, marks=pytest.mark.long),
        pytest.param("encoder", 2, marks=pytest.mark.long),
        pytest.param("encoder", 4, marks=pytest.mark.long),
        pytest.param("llama", 2, marks=pytest.mark.long),
        pytest.param("llama", 4, marks=pytest.mark.long),
        pytest.param("t5", 2, marks=pytest.mark.long),
        pytest.param("t5", 4, marks=pytest.mark.long),
    ],
)
def test_same_bits_for_any_team(name: str, slices: int, yard: Yard) -> None:
    """With dropout, for every size of teams and every number of workers up to four."""
    wanted = alone(yard, name, slices)
    for team in range(2, slices + 1):
        for workers in range(team, 5):
            found = yard.run(
                task_of(name, 0.2), workers=workers, slices=slices, team=team, **QUICK, **SETTINGS
            )
            assert_same(found, wanted)
            assert not events(found.folder, "died", "corrupt")


def test_an_encoder_in_teams(yard: Yard) -> None:
    """Three slices for two members, with everything that looks at what is computed."""
    wanted = yard.run(task_of("encoder", 0.2), workers=1, slices=3, **SETTINGS)
    settings = {**SETTINGS, "audit": 0.5, "purity": 1.0, "workers": 3, "slices": 3, "team": 2}
    found = yard.run(task_of("encoder", 0.2), **settings)
    assert_same(found, wanted)
    assert not events(found.folder, "corrupt")


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_grad_norm": 0.1, "precision": "bf16"},
        pytest.param({"shards": 1, "batch_size": 5}, marks=pytest.mark.long),
        pytest.param({"loaders": 1, "shards": 5}, marks=pytest.mark.long),
    ],
)
def test_with_other_settings(settings: dict[str, Any], yard: Yard) -> None:
    common = {**SETTINGS, **QUICK, "slices": 3, **settings}
    wanted = yard.run(task_of("encoder", 0.2), workers=1, **common)
    for team, workers in ((2, 2), (3, 3), (2, 4)):
        if workers <= common["shards"] * team:
            found = yard.run(task_of("encoder", 0.2), workers=workers, team=team, **common)
            assert_same(found, wanted)


@pytest.mark.parametrize(
    "phase",
    [
        "team_forward",
        "team_backward",
        pytest.param("team_slot", marks=pytest.mark.long),
        pytest.param("slot", marks=pytest.mark.long),
        pytest.param("barrier", marks=pytest.mark.long),
        "update_begin",
    ],
)
@pytest.mark.parametrize("worker_id", [0, 1])
def test_a_death_in_each_phase(phase: str, worker_id: int, yard: Yard) -> None:
    """Of the leader, and of a member that follows. There are more shards than teams: claims."""
    settings = {**SETTINGS, **QUICK, "shards": 4, "slices": 4}
    wanted = yard.run(task_of("encoder", 0.2), workers=1, **settings)
    fault = Fault(worker_id=worker_id, step=2, phase=phase)
    found = yard.run(task_of("encoder", 0.2), workers=3, team=2, faults=(fault,), **settings)
    assert_struck(found.folder, [fault])
    assert_same(found, wanted)


@pytest.mark.long
def test_deaths_one_after_the_other(yard: Yard) -> None:
    settings = {**SETTINGS, **QUICK, "slices": 4, "steps": 8}
    faults = tuple(
        Fault(worker_id=-1, step=step, phase=phase)
        for step, phase in enumerate(
            (
                "team_forward",
                "forward",
                "team_backward",
                "team_slot",
                "load",
                "update_end",
                "reduce",
            )
        )
    )
    wanted = yard.run(task_of("t5", 0.2), workers=1, **settings)
    found = yard.run(task_of("t5", 0.2), workers=4, team=4, faults=faults, **settings)
    assert_struck(found.folder, faults)
    assert_same(found, wanted)


def test_who_waits_for_a_member_is_not_taken_for_stalled(yard: Yard) -> None:
    """The one that is stopped is killed, and it is told who waits for it."""
    fault = Fault(worker_id=1, step=2, phase="team_backward", kind="stop")
    settings = {**SETTINGS, **QUICK, "slices": 2}
    wanted = yard.run(task_of("encoder", 0.2), workers=1, **settings)
    found = yard.run(
        task_of("encoder", 0.2), workers=2, team=2, faults=(fault,), stall_seconds=1.0, **settings
    )
    (stalled,) = events(found.folder, "stalled")
    assert (stalled["worker"], stalled["step"]) == (1, 2)
    assert stalled["shard"] is not None
    assert "worker 0 waits for it in a backward pass" in stalled["reason"]
    assert [event["worker"] for event in events(found.folder, "died")] == [1]
    assert_same(found, wanted)


class Slow(Mlp):
    """So that a run is caught under way."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if model.training:
            time.sleep(float(os.environ.get(PACE, "0")))
        return super().loss(model, batch)


def test_waiting_for_a_member_counts_as_waiting(yard: Yard) -> None:
    """Not as computing: the page and the report tell who is slow."""
    slow = Fault(worker_id=1, step=0, phase="load", kind="slow")
    settings = {**SETTINGS, **QUICK, "slices": 2, "steps": 10, "evaluate": False}
    found = yard.run(Mlp(0.2), workers=2, team=2, faults=(slow,), **settings)
    rows = [event["workers"] for event in events(found.folder, "timed")]
    compute, _, wait = (sum(row["0"][column] for row in rows) for column in range(3))
    shards = settings["shards"] * settings["steps"]
    assert wait > 0.9 * SLOW_SECONDS * (shards - 1) > compute


def test_scaled_while_it_runs(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teams are made anew: a smaller one, some, and one of a single worker."""
    settings = {**SETTINGS, **QUICK, "slices": 2, "steps": 60, "threads": 1}
    wanted = yard.run(Slow(0.2), workers=1, **settings)
    monkeypatch.setenv(PACE, "0.02")
    folder = yard.path()
    run = lockstep.start(
        Slow(0.2), workers=2, team=2, max_workers=4, out=folder, quiet=True, **settings
    )

    def members() -> int:
        formed = events(folder, "formed") if Path(folder, "events.jsonl").exists() else []
        return len(formed[-1]["seats"]) if formed else 0

    until(members, 30, "a beginning")
    for workers in (3, 1, 4):
        run.scale(workers)
        until(lambda: members() == workers, 20, f"{workers} members")  # noqa: B023
    assert_same(run.result(), wanted)


def test_resumed_with_another_team_and_verified(yard: Yard) -> None:
    task = Mlp(drop=0.2)
    settings = {**SETTINGS, **QUICK, "slices": 4, "checkpoint_steps": 2}
    result = yard.run(task, workers=4, team=4, **settings)
    assert lockstep.verify(result.folder, workers=1, task=task).final
    assert lockstep.verify(result.folder, workers=4, task=task).final
    assert (
        lockstep.evaluate(result.folder, task=task, workers=2).metrics["loss"]
        == result.metrics["loss"]
    )
    (result.folder / "result.json").unlink()
    for path in sorted((result.folder / "checkpoints").glob("step-*"))[1:]:
        (path / "manifest.json").unlink()
    with pytest.raises(JobError, match="more members than there are workers"):
        lockstep.resume(result.folder, workers=1, team=2, task=task, quiet=True)
    resumed = lockstep.resume(result.folder, workers=3, team=2, task=task, quiet=True)
    assert resumed.fingerprint == result.fingerprint
    assert_same(resumed, alone(yard, "mlp", 4))


HELD_OUT: dict[str, Any] = {"slices": 4, "eval_batch_size": 48}
"""One held-out batch, which a team computes together."""


def test_held_out_batches_in_teams(yard: Yard) -> None:
    """The same metrics; and when a member dies in the middle of one, it is asked for again."""
    settings = {**SETTINGS, **QUICK, **HELD_OUT}
    wanted = yard.run(task_of("encoder", 0.2), workers=1, **settings)
    for worker_id in (0, 1):
        fault = Fault(worker_id=worker_id, step=settings["steps"], phase="team_forward")
        found = yard.run(task_of("encoder", 0.2), workers=3, team=3, faults=(fault,), **settings)
        assert_struck(found.folder, [fault])
        assert_same(found, wanted)


def test_predictions_in_teams(yard: Yard, tmp_path: Path) -> None:
    task = Mlp(0.2)
    result = yard.run(task, workers=2, team=2, **SETTINGS, **QUICK, **HELD_OUT)
    data = tmp_path / "data.jsonl"
    data.write_text('{"x": 1}\n{"x": -2}\n{"x": 3}\n')
    rows = []
    for workers in (1, 2, 4):
        out = tmp_path / f"{workers}.jsonl"
        lockstep.predict(result.folder, data, out=out, task=task, workers=workers, batch_size=2)
        rows.append(out.read_text())
        found = lockstep.evaluate(result.folder, task=task, workers=workers)
        assert found.metrics["loss"] == result.metrics["loss"]
    assert rows[0] == rows[1] == rows[2]


def test_an_embedding_that_turns_out_to_need_its_dense_form(yard: Yard) -> None:
    """One member finds it, and all begin the shard again; one that is new, once more."""
    settings = {**SETTINGS, **QUICK, "slices": 2}
    wanted = yard.run(Twice(), workers=1, **settings)
    fault = Fault(worker_id=1, step=2, phase="team_backward")
    found = yard.run(Twice(), workers=2, team=2, faults=(fault,), **settings)
    assert_struck(found.folder, [fault])
    assert_same(found, wanted)


class Twice(Table):
    """The table is used twice, which only the dense form can sum."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        (x,) = batch
        logits = model(x) + model(x.flip(1))
        return nn.functional.cross_entropy(logits.flatten(0, 1), x.roll(1, 1).flatten())


class Penalised(Mlp):
    """Gradients of gradients, a matrix that is read, and a pass without gradients."""

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():  # it is evaluated
            return super().loss(model, batch)
        x, y = batch
        with torch.no_grad():
            target = model(x).tanh()
        x = x.clone().requires_grad_()
        found = model(x)
        (slope,) = torch.autograd.grad(found.square().sum(), x, create_graph=True)
        penalty = slope.square().mean() + model[5].weight.square().mean()
        error = (found - y).square().mean() + (found - target).abs().mean()
        loss: torch.Tensor = error + 0.01 * penalty
        return loss


class Checkpointed(Mlp):
    """The chain is computed again in the backward pass."""

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        from torch.utils.checkpoint import checkpoint

        x, y = batch
        found = checkpoint(model, x.clone().requires_grad_(), use_reentrant=False)
        error: torch.Tensor = (found - y).square().mean()
        return error


@pytest.mark.parametrize("task", [Penalised, Checkpointed])
def test_other_ways_to_differentiate(task: type[Mlp], yard: Yard) -> None:
    settings = {**SETTINGS, **QUICK, "slices": 3}
    wanted = yard.run(task(0.2), workers=1, **settings)
    assert_same(yard.run(task(0.2), workers=3, team=3, **settings), wanted)


class Biased(Mlp):
    """What it computes depends on the process: a fault, as far as a team can see."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, batch) * (1.0 + 1e-6 * (os.getpid() % 1000))


def test_members_that_get_another_loss_are_named(yard: Yard) -> None:
    for evaluate, what in ((False, "another loss"), (True, "other results")):
        with pytest.raises(IntegrityError, match=rf"workers . and . of one team .* {what}"):
            yard.run(Biased(), workers=2, slices=2, team=2, evaluate=evaluate, **QUICK, **SETTINGS)


def test_other_hosts_are_refused(site: Site) -> None:
    on = site.agents({"b": 1}, 1)
    with pytest.raises(JobError, match="teams are for one host, for now") as caught:
        site.run("transformer", on, slices=2, team=2)
    assert "the results are the same" in caught.value.fix


def test_the_plan_and_the_summary_show_teams(yard: Yard) -> None:
    result = yard.run(Mlp(), workers=3, slices=2, team=2, **QUICK, **SETTINGS)
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["plan"]["team"] == 2
    assert "team" not in manifest["identity"]
    ended = command.lockstep("status", str(result.folder), cwd=ROOT)
    assert "3 workers x 1 thread in teams of 2, 3 shards" in ended.stdout
    plan = lockstep.plan(Mlp(), workers=3, slices=2, team=2, **SETTINGS)
    assert any(reason.startswith("2 teams of workers: 0 + 1, 2;") for reason in plan.reasons)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"team": 2}, "without slices"),
        ({"team": 3, "slices": 2}, "more members than there are slices"),
        ({"team": 2, "slices": 2, "workers": 1}, "more members than there are workers"),
        ({"team": 2, "slices": 2, "compile": True}, "compile"),
        ({"team": 2, "slices": 2, "local_steps": 2}, "local steps"),
        ({"team": 2, "slices": 2, "ownership": "sharded"}, "one host"),
        ({"team": 2, "slices": 2, "shards": 2, "workers": 5}, "more workers than shards"),
        ({"team": 0, "slices": 2}, "out of range"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(JobError, match=what):
        lockstep.Job(task="mnist", **settings)
