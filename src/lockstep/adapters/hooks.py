"""What of a LightningModule is honoured without a Trainer, and what is refused by name."""

from __future__ import annotations

from typing import Any

from lockstep.errors import TaskError

PARTS = ("on_test_", "on_predict_", "test_", "predict_", "teardown")
"""Hooks of testing and predicting have no part in training; what ends with the run frees itself."""
OF_MODULE = {"configure_model", "setup"}
"""Hooks of a module that are called. Its own loaders are not: the data module has them."""
OF_DATA = {"prepare_data", "setup", "train_dataloader", "val_dataloader"}
"""Hooks of a data module that are called."""
TRAINING = (
    "backward", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step",
    "configure_gradient_clipping", "configure_callbacks",
)  # fmt: skip
"""Methods of a LightningModule that would change what a step is."""


def check_module(module: Any, kind: type) -> None:
    """Refuse a LightningModule that needs its Trainer.

    Raises:
        TaskError: it optimizes by itself, or has a hook that would not be called.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise TaskError(
            f"{name} optimizes manually",
            expected="automatic_optimization = True: a step is one update by one optimizer",
            found="automatic_optimization = False",
            fix="return the loss from training_step; clipping is the setting clip_grad_norm",
        )
    _refuse(name, _overridden(module, kind, TRAINING) - OF_MODULE)


def check_data(datamodule: Any, kind: type) -> None:
    """Refuse a data module with a hook that would not be called.

    Raises:
        TaskError: it has one.
    """
    _refuse(type(datamodule).__name__, _overridden(datamodule, kind, ()) - OF_DATA)


def _overridden(owner: Any, kind: type, more: tuple[str, ...]) -> set[str]:
    """The hooks of Lightning's class that the owner's class has anew."""
    bases = [base for base in kind.__mro__ if base.__name__ in ("ModelHooks", "DataHooks",
                                                                "CheckpointHooks")]  # fmt: skip
    hooks = {name for base in bases for name in vars(base) if not name.startswith("_")} | set(more)
    return {
        name
        for name in hooks
        if not name.startswith(PARTS)
        and getattr(type(owner), name, None) is not getattr(kind, name, None)
    }


def _refuse(name: str, hooks: set[str]) -> None:
    if hooks:
        raise TaskError(
            f"{name} has hooks that only Lightning's Trainer calls",
            expected="training_step, validation_step, configure_optimizers, configure_model and "
            "setup of the module; prepare_data, setup and the loaders of the data module",
            found=", ".join(sorted(hooks)),
            fix="move what they do into these; what changes weights or gradients cannot be kept, "
            "clipping is the setting clip_grad_norm",
        )
