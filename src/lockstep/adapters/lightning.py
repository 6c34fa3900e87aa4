"""`from_lightning`: a LightningModule with its data module, without Lightning's Trainer."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lockstep.adapters.hooks import check_data, check_module
from lockstep.adapters.optimizers import Configured, Following
from lockstep.adapters.parts import need
from lockstep.errors import JobError, TaskError
from lockstep.job import Parameters, Task

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import Dataset


def from_lightning(module: Any, datamodule: Any) -> Task:
    """Train a LightningModule: its training_step, configure_optimizers and validation_step.

    What the Trainer would be told is a setting of the job: `clip_grad_norm` for gradient_clip_val,
    `batch_size` (times accumulate_grad_batches) for the loaders', `data_epochs` for max_epochs,
    `precision`. There is no Trainer: `self.trainer` raises, `current_epoch`, `global_step` and
    batch_idx are 0.

    Args:
        module: a LightningModule, sent to the workers with its weights.
        datamodule: a LightningDataModule. Of its loaders the data set and the collate_fn are used;
            batches and their order are the job's.

    Raises:
        JobError: Lightning is not installed, or an argument is of the wrong kind.
        TaskError: the module or the data module wants what cannot be kept: manual optimization, or
            a hook that is named in the message.
    """
    modules, datamodules = _kinds("LightningModule"), _kinds("LightningDataModule")
    for name, value, kinds in (
        ("module", module, modules),
        ("datamodule", datamodule, datamodules),
    ):
        if not isinstance(value, kinds):
            raise JobError(
                f"the {name} is not Lightning's",
                expected=f"a {kinds[0].__name__}",
                found=repr(type(value)),
                fix="loaders alone become one by LightningDataModule.from_datasets(train_set, "
                "val_set); for a plain nn.Module there is lockstep.from_module",
            )
    check_module(module, next(kind for kind in modules if isinstance(module, kind)))
    check_data(datamodule, next(kind for kind in datamodules if isinstance(datamodule, kind)))
    return LightningTask(module, datamodule)


def _kinds(name: str) -> tuple[type, ...]:
    """The class, of the packages that have it: whoever has a module has imported one of them."""
    found = [sys.modules[package] for package in PACKAGES if package in sys.modules]
    return tuple(getattr(package, name) for package in found or [need(PACKAGES[0], "lightning")])


PACKAGES = ("lightning.pytorch", "pytorch_lightning")


class LightningTask(Task):
    """A LightningModule and its data as a task. Made by `from_lightning`."""

    def __init__(self, module: Any, datamodule: Any) -> None:
        self._module, self._datamodule = module, datamodule
        self._ready = False
        self._collate: Any = None
        self.made_from = (module, datamodule)

    def _prepared(self) -> Any:
        """The data module, once it has its data."""
        if not self._ready:
            self._datamodule.prepare_data()
            self._datamodule.setup("fit")
            self._ready = True
        return self._datamodule

    def model(self) -> nn.Module:
        self._module.setup("fit")
        self._module.configure_model()
        module: nn.Module = self._module.train()
        return module

    def train_data(self) -> Dataset[Any]:
        from torch.utils.data import default_collate

        loader = _one(self._prepared().train_dataloader(), "train_dataloader")
        self._collate = loader.collate_fn
        if self._collate is not default_collate:
            self.collate = self._collate  # type: ignore[method-assign]
        dataset: Dataset[Any] = loader.dataset
        return dataset

    def eval_data(self) -> Dataset[Any] | None:
        if not _overrides(self._module, "validation_step"):
            return None
        if not _overrides(self._datamodule, "val_dataloader"):
            return None
        loader = _one(self._datamodule.val_dataloader(), "val_dataloader")
        if not _alike(loader.collate_fn, self._collate):
            raise TaskError(
                "training and validation make their batches in two ways",
                expected="one collate_fn for both",
                found=f"{self._collate!r} and {loader.collate_fn!r}",
                fix="give both loaders the same collate_fn",
            )
        dataset: Dataset[Any] = loader.dataset
        return dataset

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        with _logging(model, _drop):
            found = _call(model.training_step, batch)
        loss: torch.Tensor | None = found.get("loss") if isinstance(found, Mapping) else found
        if loss is None:
            raise TaskError(
                "training_step returned no loss",
                expected='a scalar tensor, or a dict with "loss"',
                found=repr(found)[:200],
                fix="return the loss of every batch: none can be skipped",
            )
        return loss

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        configured = Configured.of(self._module)
        self.scheduler_interval = configured.interval
        return configured.optimizer

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """The schedule of configure_optimizers, called anew: schedules begin more than once."""
        configured = Configured.of(self._module)
        return None if configured.scheduler is None else Following(optimizer, configured)

    def metrics(self, model: Any, batch: Any) -> Mapping[str, torch.Tensor | float]:
        """What validation_step logs: each value weighted by the samples of its batch."""
        logged: dict[str, Any] = {}
        with _logging(model, functools.partial(_keep, logged)):
            _call(model.validation_step, batch)
        return logged


def _overrides(owner: Any, name: str) -> bool:
    """Whether it has a method of its own and not Lightning's, by its class or put into the object
    as `LightningDataModule.from_datasets` does."""
    method = getattr(type(owner), name, None)
    of_class = method is not None and not method.__module__.startswith(OURS)
    return of_class or name in vars(owner)


OURS = ("lightning.", "pytorch_lightning.")
"""How the names of Lightning's own modules begin."""


def _call(step: Callable[..., Any], batch: Any) -> Any:
    """`training_step(batch)` or `training_step(batch, batch_idx)`, whatever they are called there;
    the index is always 0, and so is dataloader_idx where it is wanted."""
    places = [p for p in inspect.signature(step).parameters.values() if p.kind in BY_PLACE]
    wanted = [p for p in places if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    indices = len(places) > 1 or any(p.kind is p.VAR_POSITIONAL for p in places)
    return step(batch, *[0] * max(len(wanted) - 1, indices))


BY_PLACE = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)


def _one(loader: Any, name: str) -> Any:
    """The only loader, with an order that is the data's own or a shuffle.

    Raises:
        TaskError: there are several, or it draws its samples in another way.
    """
    from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

    if isinstance(loader, list | tuple) and len(loader) == 1:
        loader = loader[0]
    if not isinstance(loader, DataLoader):
        raise TaskError(
            f"{name} did not return one DataLoader",
            expected="a torch.utils.data.DataLoader",
            found=repr(type(loader)),
            fix="join several data sets by torch.utils.data.ConcatDataset",
        )
    sampler = getattr(loader, "sampler", None)
    usual = type(sampler) in (RandomSampler, SequentialSampler)
    own_batches = type(loader.batch_sampler).__name__ not in ("BatchSampler", "NoneType")
    if not usual or own_batches or getattr(sampler, "replacement", False):
        raise TaskError(
            f"{name} draws its samples in a way of its own",
            expected="every sample once per data epoch: shuffle=True or shuffle=False",
            found=type(loader.batch_sampler if own_batches else sampler).__name__,
            fix="leave out sampler and batch_sampler; the order follows from the job's seed",
        )
    return loader


def _alike(one: Any, other: Any) -> bool:
    """Whether two collate functions are the same; of objects, of the same class and content."""
    if one is other or one == other:
        return True
    return (
        type(one) is type(other)
        and bool(getattr(one, "__dict__", None))
        and (vars(one) == vars(other))
    )


@contextlib.contextmanager
def _logging(module: Any, log: Callable[..., None]) -> Iterator[None]:
    """Have the module log by this function, while this lasts: `self.log` and `self.log_dict`."""

    def log_dict(values: Mapping[str, Any], *args: Any, **options: Any) -> None:
        for name, value in values.items():
            log(name, value, *args, **options)

    # In the instance, past nn.Module's own way of setting attributes.
    vars(module).update(log=log, log_dict=log_dict)
    try:
        yield
    finally:
        del vars(module)["log"], vars(module)["log_dict"]


def _drop(name: str, value: Any, *args: Any, **options: Any) -> None:
    """What is logged in training is not looked at."""


def _keep(
    logged: dict[str, Any],
    name: str,
    value: Any,
    *args: Any,
    reduce_fx: Any = "mean",
    **options: Any,
) -> None:
    """Keep what is logged in validation.

    Raises:
        TaskError: it is no mean over the batch.
    """
    import torch

    if reduce_fx not in ("mean", torch.mean) or not _is_number(value):
        raise TaskError(
            f"the logged value {name!r} is not a number that can be averaged over samples",
            expected="a number or a tensor of one element, with reduce_fx='mean'",
            found=f"a {type(value).__name__}, reduce_fx={reduce_fx!r}",
            fix="log the mean over the batch, for an accuracy (scores.argmax(1) == labels)"
            ".float().mean(); for what is no mean write a lockstep.Task with outputs and score",
        )
    logged[name] = value


def _is_number(value: Any) -> bool:
    import torch

    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float)
