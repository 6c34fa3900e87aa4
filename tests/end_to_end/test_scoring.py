"""Metrics over all held-out samples together, and baselines: exact, in order, for any workers."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lockstep
from lockstep.agent import evaluation_rounds as evaluation
from lockstep.cli.output import show_result
from lockstep.errors import TaskError
from lockstep.job.faults import Fault
from lockstep.results.result import Result
from lockstep.worker import evaluate as held_out
from tests.support.harmed_runs import events
from tests.support.named_tasks import HELD_OUT, Blobs


class Scored(Blobs):
    """Gathers a tensor of floats, one of integers, one of booleans, and texts."""

    def __init__(self, mark: str = "", number: int = signal.SIGKILL) -> None:
        super().__init__()
        self.mark, self.number = mark, number

    def outputs(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        scores = model(batch[0])
        return {
            "scores": scores,
            "label": batch[1],
            "right": scores.argmax(1) == batch[1],
            "text": [f"é {label}" for label in batch[1].tolist()],
            "drawn": torch.rand(len(batch[1]), 1, 2),
        }

    def score(self, outputs: dict[str, Any]) -> dict[str, float]:
        if self.mark and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), self.number)
        whole = self.eval_data()
        assert outputs["label"].equal(whole.tensors[1])  # type: ignore[union-attr]
        assert outputs["text"] == [f"é {label}" for label in outputs["label"].tolist()]
        assert outputs["scores"].dtype == torch.float64
        assert outputs["scores"].shape == (HELD_OUT, 3)
        assert outputs["right"].dtype == torch.bool
        return {
            "right": float(outputs["right"].double().mean()),
            "sum": outputs["scores"].sum(),
            "drawn": outputs["drawn"].sum().item() + torch.rand(()).item(),
        }

    def baseline(self) -> dict[str, float]:
        return {"accuracy": 1 / 3, "drawn": torch.rand(()).item()}


def run(task: lockstep.Task, out: str, workers: int, **settings: Any) -> Result:
    settings = {
        "data_epochs": 2,
        "batch_size": 20,
        "eval_batch_size": 16,
        "shards": 3,
        "threads": 1,
        **settings,
    }
    return lockstep.run(task, workers=workers, out=out, quiet=True, **settings)


def test_the_same_for_any_number_of_workers(run_folders: Callable[[], str]) -> None:
    results = [run(Scored(), run_folders(), workers) for workers in (1, 2, 3)]
    for result in results:
        assert result.metrics == results[0].metrics
        assert result.history == results[0].history
        assert result.baseline == results[0].baseline
        assert result.metrics["right"] == pytest.approx(result.metrics["accuracy"])
    assert len(results[0].history) == 2
    assert {"sum", "drawn"} <= results[0].history[0]["metrics"].keys()
    model = results[0].model()
    with torch.no_grad():
        batches = Scored().eval_data().tensors[0].split(16)  # type: ignore[union-attr]
        scores = torch.cat([model(batch).double() for batch in batches])
    assert scores.sum().item() == results[0].metrics["sum"]
    assert Result.open(results[0].folder).baseline["accuracy"] == 1 / 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_stops_while_it_scores(
    number: int, run_folders: Callable[[], str], tmp_path: Path
) -> None:
    whole = run(Scored(), run_folders(), 2)
    harmed = run(Scored(str(tmp_path / "mark"), number), run_folders(), 2)
    assert (tmp_path / "mark").exists()
    assert len(events(harmed.folder, "died")) == 1
    assert (harmed.metrics, harmed.history) == (whole.metrics, whole.history)


def test_a_worker_that_dies_while_it_evaluates(run_folders: Callable[[], str]) -> None:
    whole = run(Scored(), run_folders(), 2)
    harmed = run(Scored(), run_folders(), 2, faults=(Fault(worker_id=1, step=5, phase="evaluate"),))
    assert len(events(harmed.folder, "died")) == 1
    assert (harmed.metrics, harmed.history) == (whole.metrics, whole.history)


def test_baselines_are_shown(run_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_result(run(Scored(), run_folder, 1, steps=3), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("accuracy")]
    assert line.endswith("(baseline 0.333333)")
    result = json.loads((Path(run_folder) / "result.json").read_text())
    assert result["baseline"]["accuracy"] == 1 / 3
    assert "(baseline 0.3333)" in (Path(run_folder) / "report.html").read_text()


class Wrong(Blobs):
    """Answers with something that cannot be."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def score(self, outputs: dict[str, Any]) -> Any:
        return self.answer

    def baseline(self) -> Any:
        return self.answer


@pytest.mark.parametrize("answer", [[1.0], {"auc": "high"}, {"auc": torch.zeros(2)}, None])
def test_answers_that_are_no_numbers(answer: Any) -> None:
    with pytest.raises(TaskError, match=r"Task\.score did not return one number per name"):
        held_out.score(Wrong(answer), {}, seed=0)
    with pytest.raises(TaskError, match=r"Task\.baseline did not return one number per name"):
        held_out.baseline(Wrong(answer), seed=0)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (torch.zeros(2), "one entry per sample"),
        (torch.zeros(()), "one entry per sample"),
        (["a"], "one entry per sample"),
        ([{1}, {2}, {3}], "cannot be sent on"),
    ],
)
def test_outputs_that_cannot_be(output: Any, said: str) -> None:
    with pytest.raises(TaskError, match=said):
        held_out._listed("it", output, 3)


class Changing(Blobs):
    """Gives other outputs for the short last batch."""

    def outputs(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"label" if len(batch[1]) == 16 else "other": batch[1]}


def test_outputs_that_change(run_folder: str) -> None:
    with pytest.raises(TaskError, match=r"Task\.outputs gave other outputs for batch 1"):
        run(Changing(), run_folder, 2, steps=1)


class Endless(Scored):
    """Never comes to a score."""

    def score(self, outputs: dict[str, Any]) -> dict[str, float]:
        while True:
            pass


def test_a_score_that_never_comes(run_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "SCORE_SECONDS", 0.2)
    with pytest.raises(TaskError, match="does not return"):
        run(Endless(), run_folder, 1, steps=1)
