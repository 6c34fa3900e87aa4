"""Loggers by name: what TensorBoard, MLflow and W&B are given, read back by their own readers."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.errors import JobError
from lockstep.results.callbacks import EvaluationDone, StepDone
from lockstep.results.loggers import LOGGERS, Logger, make_loggers
from tests.support.harmed_runs import Yard, assert_same, events, yard
from tests.support.logging_task import BATCH, Logs

__all__ = ["yard"]  # a fixture

SETTINGS: dict[str, Any] = {"batch_size": BATCH, "steps": 12, "seed": 3}
NAMES = ["accuracy", "größe", "loss", "noisy", "weight"]


def run_with(yard: Yard, logger: str) -> lockstep.Result:
    """Nothing of the run changes, and the logger has heard everything."""
    result = yard.run(Logs(), workers=2, log=[logger], **SETTINGS)
    assert_same(result, yard.undisturbed(Logs(), **SETTINGS))
    assert not events(result.folder, "callback")
    return result


def test_tensorboard(yard: Yard) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    make_ndarray = importlib.import_module("tensorboard.util.tensor_util").make_ndarray
    result = run_with(yard, "tensorboard")
    found = reader.EventAccumulator(
        str(result.folder / "tensorboard"), size_guidance={"tensors": 0}
    )
    found.Reload()
    tags = found.Tags()["tensors"]
    assert sorted(tags) == sorted(f"{part}/{n}" for part in ("train", "held-out") for n in NAMES)
    table = result.steps_table()
    for name in NAMES:
        curve = [
            (event.step, float(make_ndarray(event.tensor_proto)))
            for event in found.Tensors(f"train/{name}")
        ]
        assert [step for step, _ in curve] == list(range(1, 13))
        assert [value for _, value in curve] == pytest.approx(table[name], rel=1e-6)  # float32
        held_out = [event.step for event in found.Tensors(f"held-out/{name}")]
        assert held_out == [each["step"] for each in result.history]


def test_mlflow(yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    result = run_with(yard, "mlflow")
    client = mlflow.tracking.MlflowClient()
    experiment = client.get_experiment_by_name("lockstep")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (result.folder.name, "FINISHED")
    assert run.data.params["seed"] == "3"
    table = result.steps_table()
    for name in ("loss", "accuracy", "weight"):
        curve = client.get_metric_history(run.info.run_id, f"train/{name}")
        assert [(each.step - 1, each.value) for each in curve] == list(enumerate(table[name]))
    held_out = client.get_metric_history(run.info.run_id, "held-out/loss")
    assert [each.value for each in held_out] == [e["metrics"]["loss"] for e in result.history]


def test_wandb(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = run_with(yard, "wandb")
    wandb.teardown()
    (file,) = (result.folder / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    for name in ("train/loss", "train/accuracy", "held-out/loss"):
        assert name.encode() in content
    for value in (result.metrics["train_accuracy"], result.history[-1]["metrics"]["loss"]):
        assert repr(value).encode() in content


def test_trackio(
    yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # read when it is imported
    pytest.importorskip("trackio", reason="needs the extra trackio")
    result = run_with(yard, "trackio")
    api = importlib.import_module("trackio").Api()
    (run,) = api.runs("lockstep")
    assert run.name == result.folder.name
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"train/accuracy" in content
    assert not capfd.readouterr().out


def test_one_that_does_not_answer_is_no_error_of_the_run(
    yard: Yard, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    result = yard.run(Logs(), workers=2, log=["mlflow"], **SETTINGS)
    assert_same(result, yard.undisturbed(Logs(), **SETTINGS))
    (said,) = events(result.folder, "callback")
    assert "MLflow" in said["note"]


def test_names(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(yard.path())
    with pytest.raises(JobError, match="a logger that there is not: 'tensorbord'") as error:
        yard.run(Logs(), log=["tensorbord"], out=str(folder), **SETTINGS)
    assert "tensorboard or mlflow or wandb or trackio" in error.value.expected
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in LOGGERS:
        with pytest.raises(JobError, match=f"{name} needs a package that is not installed"):
            yard.run(Logs(), log=[name], out=str(folder), **SETTINGS)
    assert not folder.exists()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: sys)
    assert [type(each) for each in make_loggers(["wandb", "mlflow", "wandb"])] == [
        LOGGERS["wandb"], LOGGERS["mlflow"],
    ]  # fmt: skip


def test_the_interface_of_all_of_them() -> None:
    """Without their packages: where numbers go, and under which names."""

    class Kept(Logger):
        def __init__(self) -> None:
            self.kept: list[Any] = []

        def log(self, metrics: Any, step: int) -> None:
            self.kept.append((dict(metrics), step))

    logger = Kept()
    logger.on_step(StepDone(step=4, data_epoch=0, samples=2, metrics={"loss": math.inf}))
    logger.on_evaluation(EvaluationDone(step=5, data_epoch=0, metrics={"accuracy": 0.5}))
    assert logger.kept == [({"train/loss": math.inf}, 5), ({"held-out/accuracy": 0.5}, 5)]
