"""Slices: the bits depend on how many there are, and on nothing else that is not in the job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lockstep
from lockstep.errors import JobError, TaskError
from lockstep.job.faults import Fault
from tests.support import command
from tests.support.file_tree import ROOT
from tests.support.harmed_runs import Yard, assert_same, assert_struck, events, yard
from tests.support.multi_host_runs import Site, ended_well, site
from tests.support.sliced_tasks import PACKAGES, TASKS, Mlp, SlicedTask, Table
from tests.zoo import ZOO

__all__ = ["site", "yard"]  # fixtures

SETTINGS = {"shards": 3, "batch_size": 12, "steps": 6}
NEAR: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}
"""How near losses and parameters are to those without slices after these steps of SGD. Adam would
make as much of a gradient that is nothing but rounding as of any other."""


def task_of(name: str, drop: float = 0.0, *, sgd: bool = False) -> SlicedTask:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return TASKS[name](drop, sgd=sgd)


def losses(result: lockstep.Result) -> list[float]:
    return list(result.steps_table()["loss"])


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("mlp", 2),
        ("mlp", 3),
        pytest.param("mlp", 4, marks=pytest.mark.long),
        ("encoder", 4),
        pytest.param("encoder", 2, marks=pytest.mark.long),
        pytest.param("encoder", 3, marks=pytest.mark.long),
        pytest.param("llama", 2, marks=pytest.mark.long),
        pytest.param("llama", 3, marks=pytest.mark.long),
        pytest.param("llama", 4, marks=pytest.mark.long),
        pytest.param("t5", 2, marks=pytest.mark.long),
        pytest.param("t5", 3, marks=pytest.mark.long),
        pytest.param("t5", 4, marks=pytest.mark.long),
        pytest.param("vit", 2, marks=pytest.mark.long),
        pytest.param("vit", 3, marks=pytest.mark.long),
        pytest.param("vit", 4, marks=pytest.mark.long),
    ],
)
def test_same_bits_for_any_workers_and_a_death(name: str, slices: int, yard: Yard) -> None:
    """With dropout: its numbers are the slices' own. And without: near those of one slice."""
    task = task_of(name, drop=0.2)
    alone = yard.run(task, workers=1, slices=slices, **SETTINGS)
    assert_same(yard.run(task, workers=2, slices=slices, **SETTINGS), alone)
    fault = Fault(worker_id=-1, step=3, phase="backward", kind="kill")
    harmed = yard.run(task, workers=3, slices=slices, faults=(fault,), **SETTINGS)
    assert_struck(harmed.folder, [fault])
    assert_same(harmed, alone)


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("mlp", 3),
        ("encoder", 2),
        pytest.param("llama", 4, marks=pytest.mark.long),
        pytest.param("t5", 3, marks=pytest.mark.long),
        pytest.param("vit", 4, marks=pytest.mark.long),
    ],
)
def test_slices_change_results_within_rounding(name: str, slices: int, yard: Yard) -> None:
    task = task_of(name, sgd=True)
    whole = yard.undisturbed(task, workers=1, **SETTINGS)
    sliced = yard.run(task, workers=1, slices=slices, **SETTINGS)
    assert sliced.fingerprint != whole.fingerprint
    torch.testing.assert_close(losses(sliced), losses(whole), **NEAR)
    found, wanted = (load_file(each.folder / "model.safetensors") for each in (sliced, whole))
    torch.testing.assert_close(found, wanted, **NEAR)
    assert found.keys() == wanted.keys()


@pytest.mark.long
@pytest.mark.parametrize("name", ["clip", "frozen", "muon", "tied", "transformer", "wide-branches"])
def test_tasks_of_the_zoo_in_slices(name: str, yard: Yard) -> None:
    settings = {**ZOO[name].settings(), "slices": 2}
    alone = yard.run(ZOO[name].task, workers=1, **settings)
    assert_same(yard.run(ZOO[name].task, workers=3, **settings), alone)


def test_with_other_settings(yard: Yard) -> None:
    settings = {**SETTINGS, "clip_grad_norm": 0.1, "precision": "bf16", "audit": 0.5}
    alone = yard.run(task_of("encoder", 0.2), workers=1, slices=3, **settings)
    assert_same(yard.run(task_of("encoder", 0.2), workers=3, slices=3, **settings), alone)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"ownership": "sharded"},
        pytest.param({"compression": "topk", "groups": 3}, marks=pytest.mark.long),
    ],
)
def test_the_same_bits_on_hosts(settings: dict[str, Any], site: Site) -> None:
    on = site.agents({"b": 1, "c": 1}, 1)
    fault = Fault(worker_id=0, host="b", step=3, phase="exchange")
    site.check("transformer", on, slices=2, steps=6, faults=(fault,), **settings)
    ended_well(on)


def test_a_large_embedding_in_slices(yard: Yard) -> None:
    """Each slice is a table whose touched rows are kept."""
    settings = {**SETTINGS, "slices": 2, "steps": 3}
    alone = yard.run(Table(), workers=1, **settings)
    assert_same(yard.run(Table(), workers=3, **settings), alone)


def test_the_first_state_is_that_of_the_plain_model(yard: Yard) -> None:
    """To the byte: the same seeds, then cut; and no steps are taken."""
    task = task_of("encoder")
    files = [
        (yard.run(task, slices=slices, **{**SETTINGS, "steps": 0}).folder / "model.safetensors")
        for slices in (1, 3)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_model_is_one_plain_module(yard: Yard) -> None:
    result = yard.run(Mlp(), slices=3, workers=2, **SETTINGS)
    model = result.model()
    assert type(model) is torch.nn.Sequential
    assert type(model[0]) is torch.nn.Linear
    stored = load_file(result.folder / "model.safetensors")
    assert all(torch.equal(value, stored[key]) for key, value in model.state_dict().items())
    x, y = Mlp().train_data()[:]
    assert abs((model(x) - y).square().mean().item() - result.metrics["loss"]) < 1e-6


def test_resumed_verified_evaluated(yard: Yard) -> None:
    """Checkpoints hold the plain model, and go back into slices."""
    task = Mlp(drop=0.2)
    settings = {**SETTINGS, "slices": 4, "workers": 2, "checkpoint_steps": 2}
    result = yard.run(task, **settings)
    assert lockstep.verify(result.folder, workers=1, task=task).final
    assert (
        lockstep.evaluate(result.folder, task=task, workers=1).metrics["loss"]
        == (result.metrics["loss"])
    )
    (result.folder / "result.json").unlink()
    for path in sorted((result.folder / "checkpoints").glob("step-*"))[1:]:
        (path / "manifest.json").unlink()
    resumed = lockstep.resume(result.folder, workers=3, task=task, quiet=True)
    assert resumed.fingerprint == result.fingerprint


def test_predictions(yard: Yard, tmp_path: Path) -> None:
    """The same rows for any number of workers, near those of the plain module."""
    result = yard.run(Mlp(), slices=3, **SETTINGS)
    data = tmp_path / "data.jsonl"
    data.write_text('{"x": 1}\n{"x": -2}\n{"x": 3}\n')
    rows = []
    for workers in (1, 2):
        out = tmp_path / f"{workers}.jsonl"
        lockstep.predict(result.folder, data, out=out, task=Mlp(), workers=workers, batch_size=2)
        rows.append(out.read_text())
    assert rows[0] == rows[1]
    with torch.no_grad():
        wanted = result.model()(torch.tensor([[1.0], [-2.0], [3.0]]).expand(3, 64)).sum(1)
    found = [json.loads(row)["sum"] for row in rows[0].splitlines()]
    torch.testing.assert_close(torch.tensor(found), wanted)


def test_one_slice_is_what_was_before(yard: Yard) -> None:
    """Neither the bits nor the identity of a run know of slices that are not asked for."""
    result = yard.run(Mlp(), slices=1, workers=2, **SETTINGS)
    assert_same(result, yard.run(Mlp(), workers=1, **SETTINGS))
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert "slices" not in manifest["identity"]
    assert manifest["plan"]["cuts"] == []


def test_the_manifest_has_the_cuts(yard: Yard) -> None:
    result = yard.run(Mlp(), slices=2, **SETTINGS)
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["identity"]["slices"] == 2
    assert [cut["cut"] for cut in manifest["plan"]["cuts"]] == ["column", "row", "column"]


@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_traced_shards_give_the_same_bytes(drop: float, yard: Yard) -> None:
    """Slices that draw random numbers of their own are never traced."""
    plain = yard.run(Mlp(drop), slices=3, trace="never", **SETTINGS)
    traced = yard.run(Mlp(drop), slices=3, trace="always", **SETTINGS)
    assert_same(traced, plain)
    forms = [event["forms"] for event in events(traced.folder, "traced")]
    assert not forms if drop else min(forms) > 0


@pytest.mark.long
def test_compiled_slices(yard: Yard) -> None:
    settings = {**SETTINGS, "slices": 2, "compile": True}
    alone = yard.run(Mlp(), workers=1, **settings)
    assert_same(yard.run(Mlp(), workers=3, **settings), alone)
    with pytest.raises(TaskError, match="random numbers"):
        yard.run(Mlp(0.2), workers=1, **settings)


def test_the_table_of_cuts(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "task: tests.support.sliced_tasks:Mlp\nshards: 3\nbatch_size: 12\nworkers: 1\n"
        "slices: 2\nslice_plan: {'0': colwise, '5': rowwise}\n"
    )
    ended = command.lockstep("plan", str(job), "--quiet", cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    table = ended.stdout.partition("\nmatrices\n")[2].partition("\n\n")[0].splitlines()
    assert [row.split()[:2] for row in table] == [
        ["module", "cut"], ["0", "column"], ["3", "-"], ["5", "row"]
    ]  # fmt: skip
    assert "slice_plan does not name it" in table[2]
    told = json.loads(command.lockstep("plan", str(job), "--quiet", "--json", cwd=ROOT).stdout)
    assert told["cuts"][0]["pieces"] == [36, 36]


@pytest.mark.long
def test_the_example(tmp_path: Path) -> None:
    script = ROOT / "examples" / "slices.py"
    assert len(script.read_text().splitlines()) < 40
    ended = command.python(str(script), cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    *_, whole, alone, shared = (line.split() for line in ended.stdout.splitlines())
    assert alone[4:] == shared[4:]
    assert whole[5] != alone[5]
    assert abs(float(whole[4]) - float(alone[4])) < 1e-6


def test_what_names_no_module_is_refused(yard: Yard) -> None:
    with pytest.raises(JobError, match="names no module: 00") as caught:
        yard.run(Mlp(), slices=2, slice_plan={"00": "colwise"}, **SETTINGS)
    assert caught.value.fix == "write 0"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"slice_plan": {"0": "colwise"}}, "without slices"),
        ({"slices": 2, "slice_plan": {"0": "colwide"}}, "unknown word"),
        ({"slices": 2, "local_steps": 2}, "local steps"),
        ({"slices": 0}, "out of range"),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], what: str) -> None:
    with pytest.raises(JobError, match=what):
        lockstep.Job(task="mnist", **settings)
