"""Loggers: callbacks that write a run's metrics for TensorBoard, MLflow, W&B or trackio.

They have a run's metrics under `train/` by step, and under `held-out/` after each evaluation, by
how many steps were committed. A run of thousands of steps a second is not slowed down: after the
first 1,000 steps some are left out (the ledger has all of them).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.errors import JobError
from lockstep.results.callbacks import Callback, EvaluationDone, RunEnded, RunStarted, StepDone

PROJECT = "lockstep"
"""Under which name the runs are kept, where such a name is asked for."""


class Logger(Callback):
    """Logger: a callback that only has to say where numbers go."""

    package = ""
    """What has to be installed, as it is imported."""
    extra = ""
    """Which extra of Lockstep installs it."""
    steps_per_second = 4.0
    """Enough for a curve: told of each of 3,000 steps a second, TensorBoard cost a fifth."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write metrics, each under its name, after so many steps."""
        raise NotImplementedError

    def on_step(self, step: StepDone) -> None:
        self.log(_under("train", step.metrics), step.step + 1)

    def on_evaluation(self, evaluation: EvaluationDone) -> None:
        self.log(_under("held-out", evaluation.metrics), evaluation.step)


def _under(part: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{part}/{name}": value for name, value in metrics.items()}


class TensorBoard(Logger):
    """Event files in the run folder's `tensorboard/`: `tensorboard --logdir runs`."""

    package, extra = "tensorboard", "tensorboard"

    def on_start(self, run: RunStarted) -> None:
        summary = importlib.import_module("tensorboard.summary")
        self._writer = summary.Writer(str(run.folder / "tensorboard"))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self, end: RunEnded) -> None:
        self._writer.close()


class MLflow(Logger):
    """A run of MLflow's experiment `lockstep`, where MLFLOW_TRACKING_URI says."""

    package, extra = "mlflow", "mlflow"
    MOST, SECONDS = 500, 2.0
    """How many metrics are sent together, and after how long at the latest."""

    def on_start(self, run: RunStarted) -> None:
        tracking = importlib.import_module("mlflow.tracking")
        self._entities = importlib.import_module("mlflow.entities")
        self._client = tracking.MlflowClient()
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = self._client.create_experiment(PROJECT) if experiment is None else None
        made = self._client.create_run(
            number or experiment.experiment_id,
            run_name=run.name,
            tags={"folder": str(run.folder), **dict.fromkeys(run.settings.get("tags", ()), "")},
        )
        self._run_id: str = made.info.run_id
        self._waiting: list[Any] = []
        self._sent = time.monotonic()
        params = [
            self._entities.Param(name, str(value)[:500])
            for name, value in {**run.settings, **run.args}.items()
            if value is not None
        ]
        self._client.log_batch(self._run_id, params=params[:100])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._waiting += [
            self._entities.Metric(name, value, now, step) for name, value in metrics.items()
        ]
        late = time.monotonic() - self._sent > self.SECONDS
        if late or len(self._waiting) >= self.MOST:
            self._send()

    def _send(self) -> None:
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), self.MOST):
            self._client.log_batch(self._run_id, metrics=waiting[start : start + self.MOST])
        self._sent = time.monotonic()

    def on_end(self, end: RunEnded) -> None:
        self._send()
        self._client.set_terminated(self._run_id, "FAILED" if end.result is None else "FINISHED")


class WandB(Logger):
    """A run of the W&B project `lockstep`. WANDB_MODE=offline keeps it on this machine."""

    package, extra = "wandb", "wandb"

    def on_start(self, run: RunStarted) -> None:
        wandb = importlib.import_module(self.package)
        self._run = wandb.init(
            project=PROJECT, name=run.name, dir=str(run.folder), config=_config(run),
            tags=list(run.settings.get("tags", ())), reinit="create_new",
        )  # fmt: skip

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        # A step is told of before the evaluation after it: they have the same number.
        self._run.log(dict(metrics), step=step)

    def on_end(self, end: RunEnded) -> None:
        self._run.finish(exit_code=int(end.result is None))


class Trackio(Logger):
    """A run of the trackio project `lockstep`, on this machine."""

    package, extra = "trackio", "trackio"

    def on_start(self, run: RunStarted) -> None:
        trackio = importlib.import_module(self.package)
        with contextlib.redirect_stdout(sys.stderr):  # where the run's result goes, it says nothing
            self._run = trackio.init(project=PROJECT, name=run.name, config=_config(run))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def on_end(self, end: RunEnded) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


def _config(run: RunStarted) -> dict[str, Any]:
    """The settings and arguments, as JSON can hold them."""
    return {"folder": str(run.folder), **_plain(run.settings), "args": _plain(run.args)}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


LOGGERS: dict[str, type[Logger]] = {
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
    "wandb": WandB,
    "trackio": Trackio,
}
"""By the name that the setting `log` gives."""


def check_loggers(names: Sequence[str]) -> None:
    """Check that there are loggers of these names, and that what they need is installed.

    Raises:
        JobError: one is not there.
    """
    for name in names:
        kind = LOGGERS.get(name)
        if kind is None:
            raise JobError(
                f"log names a logger that there is not: {name!r}",
                expected=" or ".join(LOGGERS),
                found=name,
                fix="for others there is run(..., callbacks=[...])",
            )
        if importlib.util.find_spec(kind.package) is None:
            raise JobError(
                f"log: {name} needs a package that is not installed",
                expected=kind.package,
                found="no such package",
                fix=f"pip install {kind.package}, or lockstep-dlp[{kind.extra}]",
            )


def make_loggers(names: Sequence[str]) -> list[Logger]:
    """A logger for each of these names, each once.

    Raises:
        JobError: one is not there.
    """
    check_loggers(names)
    return [LOGGERS[name]() for name in dict.fromkeys(names)]
