"""Trainer stub: `self.trainer` with the numbers of the run, and a logger that drops everything."""

from __future__ import annotations

import importlib
import math
from typing import Any, Literal

from lockstep.errors import TaskError
from lockstep.job.position import Position

Stage = Literal["fit", "validate", "test", "predict"]


class NoTrainer:
    """Trainer stub: answers what a LightningModule may ask of its run; refuses the rest by name.

    It reports one rank in a world of one, since the results are those of one process.
    """

    world_size = num_devices = num_nodes = accumulate_grad_batches = 1
    global_rank = local_rank = node_rank = 0
    is_global_zero = True
    sanity_checking = fast_dev_run = should_stop = False
    progress_bar_callback = None
    """Lightning's `self.print` prints where there is no progress bar."""

    def __init__(self, module: Any, datamodule: Any, package: str) -> None:
        """`package`: Lightning's package that the module's class comes from."""
        self.model = self.lightning_module = module
        self.datamodule = datamodule
        self._package = package
        self.callbacks: list[Any] = []
        self.stage: Stage = "fit"
        self.position: Position | None = None
        """The position in the run; None: the run is not planned yet."""

    def __deepcopy__(self, memo: dict[int, Any]) -> NoTrainer:
        return self  # a copy of the module belongs to the same run

    @property
    def logger(self) -> Any:
        """Lightning's DummyLogger, built for each call, since it cannot be pickled."""
        return importlib.import_module(f"{self._package}.loggers.logger").DummyLogger()

    @property
    def loggers(self) -> list[Any]:
        """A list of the one logger."""
        return [self.logger]

    @property
    def current_epoch(self) -> int:
        """The data epoch; in validation, the one that has ended."""
        return 0 if self.position is None else self.position.data_epoch

    @property
    def global_step(self) -> int:
        """The number of committed steps."""
        return 0 if self.position is None else self.position.step

    @property
    def estimated_stepping_batches(self) -> int:
        """The number of steps in the run."""
        return self._planned("estimated_stepping_batches").steps

    @property
    def max_steps(self) -> int:
        """The number of steps in the run."""
        return self._planned("max_steps").steps

    @property
    def num_training_batches(self) -> int:
        """The number of steps in a data epoch."""
        return self._planned("num_training_batches").steps_per_epoch

    @property
    def max_epochs(self) -> int:
        """The number of data epochs in the run, a partial one included."""
        position = self._planned("max_epochs")
        return math.ceil(position.steps / position.steps_per_epoch)

    training = property(lambda self: self.stage == "fit")
    validating = property(lambda self: self.stage == "validate")
    testing = property(lambda self: self.stage == "test")
    predicting = property(lambda self: self.stage == "predict")

    def _planned(self, name: str) -> Position:
        if self.position is None:
            raise TaskError(
                f"self.trainer.{name} is not known yet",
                expected="use in configure_optimizers, or in a step",
                found="use in setup or configure_model, before the run is planned",
                fix="use it later, or give the module the number",
            )
        return self.position

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep what is the stub's own; anything else would be asked of a Trainer.

        Raises:
            TaskError: it would have no effect here.
        """
        own = name in OWN or name.startswith("_")
        if own or (name == "should_stop" and value is False):
            super().__setattr__(name, value)
            return
        raise (
            _stopping(value)
            if name == "should_stop"
            else TaskError(
                f"the module sets self.trainer.{name}, and there is no Trainer",
                expected="self.trainer to be asked, not told",
                found=f"self.trainer.{name} = {value!r}"[:200],
                fix="leave it out, or make it a setting of the job",
            )
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        names = {*vars(type(self)), *vars(self)} - {"position", "stage"}
        known = sorted(key for key in names if not key.startswith("_"))
        raise TaskError(
            f"the module asks for self.trainer.{name}, and there is no Trainer",
            expected=f"one of {', '.join(known)}",
            found=name + ASKED_BY.get(name, ""),
            fix="leave it out, or give the module the value",
        )


def _stopping(value: object) -> TaskError:
    return TaskError(
        "the module sets self.trainer.should_stop, and there is no Trainer that could be stopped",
        expected="a run of as many steps as were planned: other shards of the step, and other "
        "hosts, do not see that one asks for an end",
        found=f"self.trainer.should_stop = {value!r}",
        fix="set steps or data_epochs; or stop the run from outside, by the handle of "
        "lockstep.start or by `lockstep stop`",
    )


OWN = ("model", "lightning_module", "datamodule", "callbacks", "stage", "position")
"""Attributes that this package assigns."""
_OPTIMIZERS = ": self.optimizers(), self.lr_schedulers() and self.all_gather() need it"
ASKED_BY = dict.fromkeys(("strategy", "optimizers", "lr_scheduler_configs"), _OPTIMIZERS)
