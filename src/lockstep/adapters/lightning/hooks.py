"""Hooks: the hooks of a LightningModule that are called, and those that are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.errors import JobError, TaskError

PARTS = ("on_predict_", "test_", "predict_", "teardown")
"""Hooks of prediction are not part of training; teardown is not needed in a process that ends."""
LOADERS = {"prepare_data", "train_dataloader", "val_dataloader"}
OF_MODULE = LOADERS | {
    "configure_model", "setup", "on_fit_start", "on_train_start",
    "on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end",
    "on_test_start", "on_test_epoch_start", "on_test_epoch_end",
}  # fmt: skip
"""Hooks of a module that are called: its loaders where there is no data module, and the hooks of a
test where the test set is evaluated."""
OF_DATA = LOADERS | {"setup"}
"""Hooks of a data module that are called."""
TRAINING = (
    "backward", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step",
    "configure_gradient_clipping", "configure_callbacks",
    "training_step_end", "training_epoch_end", "validation_step_end", "validation_epoch_end",
)  # fmt: skip
"""Methods of a LightningModule that change what a step is, or that Lightning 2 has removed."""


def check_module(module: Any, kind: type, skip: Sequence[str], *, test: bool) -> None:
    """Refuse a LightningModule that needs its Trainer. `test`: it is tested, not trained.

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
    hooks = _overridden(module, kind, TRAINING) - OF_MODULE - {*skip}
    _refuse(name, {hook for hook in hooks if test or not hook.startswith("on_test_")})


def check_data(datamodule: Any, kind: type, skip: Sequence[str]) -> None:
    """Refuse a data module with a hook that would not be called.

    Raises:
        TaskError: it has one.
    """
    _refuse(type(datamodule).__name__, _overridden(datamodule, kind, ()) - OF_DATA - {*skip})


def check_skipped(skip: Sequence[str], kind: type) -> None:
    """Check that the names to skip are names of hooks.

    Raises:
        JobError: one of them is not.
    """
    unknown = sorted({*skip} - _hooks(kind, TRAINING)) if not isinstance(skip, str) else [skip]
    if unknown:
        raise JobError(
            "skip has names that are not hooks",
            expected="a list of names of Lightning's hooks, such as on_train_epoch_end",
            found=", ".join(unknown),
        )


def _hooks(kind: type, more: tuple[str, ...]) -> set[str]:
    bases = [base for base in kind.__mro__ if base.__name__ in ("ModelHooks", "DataHooks",
                                                                "CheckpointHooks")]  # fmt: skip
    return {name for base in bases for name in vars(base) if not name.startswith("_")} | set(more)


def _overridden(owner: Any, kind: type, more: tuple[str, ...]) -> set[str]:
    """The hooks of Lightning's class that the owner's class overrides."""
    return {
        name
        for name in _hooks(kind, more)
        if not name.startswith(PARTS)
        and getattr(type(owner), name, None) is not getattr(kind, name, None)
    }


def _refuse(name: str, hooks: set[str]) -> None:
    if hooks:
        raise TaskError(
            f"{name} has hooks that only Lightning's Trainer calls",
            expected="training_step, validation_step, configure_optimizers, and the hooks "
            + ", ".join(sorted(OF_MODULE)),
            found=", ".join(sorted(hooks)),
            fix="move what they do into these, or leave out what only prints, logs or saves: "
            f"from_lightning(..., skip={sorted(hooks)}). What changes weights or gradients cannot "
            "be kept; clipping is the setting clip_grad_norm",
        )
