"""Result: the outcome of a run, as one object and one JSON document."""

from __future__ import annotations

import dataclasses
import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import RunFolderError
from lockstep.job.task_resolution import resolve
from lockstep.job.task_source import TaskSource
from lockstep.results.best_checkpoint import named_checkpoint
from lockstep.results.checkpoint import open_checkpoint
from lockstep.results.ledger import numbers_of, read_ledger
from lockstep.results.run_folder import RunFolder
from lockstep.system.json_files import plain, with_nan

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result: the outcome of a run. `model()` returns the trained model."""

    folder: Path
    fingerprint: str
    """BLAKE3 over parameters, buffers and optimizer state: equal for any number of workers."""
    steps: int
    samples_per_second: float
    """Throughput of the steps alone, without start-up, evaluation and checkpoints."""
    metrics: dict[str, float]
    """Held-out metrics of the final state, and the last step's loss as `train_loss`."""
    workers: int
    shards: int
    threads: int
    recoveries: list[dict[str, Any]]
    wall_seconds: float
    startup_seconds: float
    """From the call to the start of the first step."""
    data_wait: float
    """The fraction of the workers' time in which they waited for data."""
    times: dict[str, dict[str, float]]
    """Per worker: seconds computing, fetching data, waiting, reducing, updating, evaluating."""
    history: list[dict[str, Any]]
    """`{"step", "data_epoch", "metrics"}` at each evaluation; as columns: `history_table()`."""
    checkpoints: list[str]
    best: dict[str, Any] | None = None
    """With `monitor`, the checkpoint with its best value: `{"step", "metric", "value",
    "checkpoint"}`."""
    stopped_early: str = ""
    """Why the run ended before its last step, by `stop_patience`; "": it did not."""
    baseline: dict[str, float] = field(default_factory=dict)
    """Metrics of a trivial predictor: `Task.baseline`."""
    source: TaskSource | None = field(default=None, repr=False, compare=False)

    def model(self, checkpoint: str | None = None) -> nn.Module:
        """The trained model, in eval mode: the task's own model with the trained weights.

        Args:
            checkpoint: the weights of another state than the last: `"best"`, or the name of one of
                `checkpoints`.

        Raises:
            RunFolderError: the task is not known here, or there is no such checkpoint.
            IntegrityError: it is damaged.
        """
        from safetensors.torch import load_file

        if self.source is None:
            raise RunFolderError(
                "the task of this result is not known here",
                fix="build the model and load model.safetensors with safetensors.torch.load_file",
            )
        task, _ = resolve(self.source)
        model = task.model()
        where = self.folder
        if checkpoint is not None:
            where = open_checkpoint(named_checkpoint(RunFolder.open(self.folder), checkpoint)).path
        model.load_state_dict(load_file(where / "model.safetensors"))
        return model.eval()

    def steps_table(self) -> dict[str, list[Any]]:
        """The committed steps as columns, for `pandas.DataFrame(...)`: `step`, `data_epoch`,
        `samples`, `loss`, `norm` where it is limited, and what `Task.loss` returns beside the loss.

        Raises:
            IntegrityError: the run's ledger is damaged; the line is named.
        """
        rows = []
        for line in read_ledger(self.folder / "ledger.jsonl"):
            if "step" in line.content:
                row = {name: line.content[name] for name in ("step", "data_epoch", "samples")}
                rows.append({**row, **numbers_of(line)})
        return as_columns(rows)

    def history_table(self) -> dict[str, list[Any]]:
        """The evaluations as columns, for `pandas.DataFrame(...)`: `step`, `data_epoch`, and each
        held-out metric."""
        rows = [
            {"step": each["step"], "data_epoch": each["data_epoch"], **each["metrics"]}
            for each in self.history
        ]
        return as_columns(rows)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        best = ""
        if self.best is not None:
            best = f"{self.best['metric']} {self.best['value']:.6g}, {self.best['checkpoint']}"
        rows = {
            **{name: f"{value:.6g}" for name, value in self.metrics.items()},
            "best": best,
            "stopped early": self.stopped_early,
            "steps": f"{self.steps:,}, {self.samples_per_second:,.0f} samples a second",
            "recoveries": len(self.recoveries),
            "fingerprint": self.fingerprint,
            "folder": self.folder,
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(str(value))}</td></tr>"
            for name, value in rows.items()
            if value
        )
        return f"<table>{cells}</table>"

    def to_message(self) -> dict[str, Any]:
        """The content of `result.json`; a metric that is not finite is null."""
        content = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("source", "folder")
        }
        message: dict[str, Any] = plain({"folder": str(self.folder), **content})
        return message

    @staticmethod
    def open(path: str | Path) -> Result:
        """The result of a finished run, read from its folder.

        Raises:
            RunFolderError: the folder has no result.
        """
        folder = RunFolder.open(path)
        manifest = folder.read_manifest()
        try:
            content = json.loads(folder.result_path.read_text())
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} has no readable result: {error}") from error
        recorded, source = manifest["source"], None
        if recorded["importable"]:
            source = TaskSource(name=recorded["name"], args=recorded["args"])
        content["metrics"] = with_nan(content["metrics"])
        return Result(**{**content, "folder": folder.path, "source": source})


def as_columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns of one length, with NaN where a row lacks a value."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}
