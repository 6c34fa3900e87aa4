"""Adapter `from_lightning`: a LightningModule with its data, without Lightning's Trainer."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.adapters.common import answer_by, need
from lockstep.adapters.lightning.dataloaders import (
    alike,
    held_out_settings_of,
    one_loader,
    settings_of,
)
from lockstep.adapters.lightning.hooks import check_data, check_module, check_skipped
from lockstep.adapters.lightning.logs import Logged, logging_to
from lockstep.adapters.lightning.optimizers import Configured, Following, bind
from lockstep.adapters.lightning.predictions import rows_of
from lockstep.adapters.lightning.trainer_stub import NoTrainer, Stage
from lockstep.adapters.lightning.validation_state import Kept, check_held, held, separate_metrics
from lockstep.errors import JobError, TaskError
from lockstep.job.position import Position
from lockstep.job.task import Parameters, Task

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import Dataset


def from_lightning(
    module: Any,
    datamodule: Any = None,
    *,
    skip: Sequence[str] = (),
    test: bool = False,
    from_record: Callable[[Mapping[str, Any]], Any] | None = None,
) -> Task:
    """Task of a LightningModule: its training_step, configure_optimizers and validation_step.

    Options of the Trainer are settings of the job: `clip_grad_norm` for gradient_clip_val,
    `data_epochs` for max_epochs, `precision`, a larger `batch_size` for accumulate_grad_batches.
    `self.trainer` is a stub that knows the numbers of the run. Modules in eval mode stay so.

    Args:
        module: a LightningModule, sent to the workers with its weights.
        datamodule: a LightningDataModule; without it, the module has the loaders. Their data sets
            and collate_fn are used, and where the job does not say otherwise also batch_size,
            shuffle and drop_last.
        skip: names of hooks not to call, such as those that only print, log or save.
        test: evaluate with test_step on test_dataloader, for `lockstep.evaluate(run, task=...)`.
        from_record: from a record of a file to predict from with predict_step: the sample, for
            `default_collate`.

    Raises:
        JobError: Lightning is not installed, or an argument is of the wrong kind.
        TaskError: the module or the data module uses manual optimization, or has a hook that is
            not supported, which the message names.
    """
    modules, datamodules = _kinds("LightningModule"), _kinds("LightningDataModule")
    for name, value, kinds in (
        ("module", module, modules),
        ("datamodule", module if datamodule is None else datamodule, (*datamodules, *modules)),
    ):
        if not isinstance(value, kinds):
            raise JobError(
                f"the {name} is not Lightning's",
                expected=f"a {kinds[0].__name__}",
                found=repr(type(value)),
                fix="loaders alone become one by LightningDataModule.from_datasets(train_set, "
                "val_set); for a plain nn.Module there is lockstep.from_module",
            )
    kind = next(kind for kind in modules if isinstance(module, kind))
    check_skipped(skip, kind)
    check_module(module, kind, skip, test=test)
    for kind_of_data in datamodules:
        if isinstance(datamodule, kind_of_data):
            check_data(datamodule, kind_of_data, skip)
    task = LightningTask(module, datamodule, _package(kind), skip, test=test)
    answer_by(task, from_record, None)
    return task


def _kinds(name: str) -> tuple[type, ...]:
    """The class of this name in each imported package of Lightning, or in the default one."""
    found = [sys.modules[package] for package in PACKAGES if package in sys.modules]
    return tuple(getattr(package, name) for package in found or [need(PACKAGES[0], "lightning")])


PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def _package(kind: type) -> str:
    """The package of Lightning that a class comes from."""
    return next(package for package in PACKAGES if kind.__module__.startswith(f"{package}."))


class LightningTask(Task):
    """Task made by `from_lightning`."""

    keep_modes = True  # as Lightning's Trainer since 2.2

    def __init__(
        self, module: Any, datamodule: Any, package: str, skip: Sequence[str], *, test: bool
    ) -> None:
        self._module, self._datamodule = module, datamodule
        self._trainer = NoTrainer(module, datamodule, package)
        self._skip = frozenset(skip)
        self._stage: Stage = "test" if test else "validate"
        self._part = "test" if test else "validation"
        self._ready = False
        self._collate: Any = None
        self._left: list[dict[str, Any]] = []
        self._loader_settings: dict[str, Any] = {}
        self.made_from = (module,) if datamodule is None else (module, datamodule)

    def set_position(self, position: Position) -> None:
        self._trainer.position = position

    def _prepared(self) -> Any:
        """The owner of the loaders, with its data prepared and set up."""
        data = self._module if self._datamodule is None else self._datamodule
        if not self._ready:
            self._module.prepare_data()
            if data is not self._module:
                data.trainer = self._trainer
                data.prepare_data()
                data.setup("fit")
            if self._stage == "test":
                data.setup("test")
            self._ready = True
        return data

    def model(self) -> nn.Module:
        module = self._module
        module.trainer = self._trainer
        module.setup("fit")
        module.configure_model()
        with logging_to(module, None):
            for hook in ("on_fit_start", "on_train_start"):
                self._hook(module, hook)
        separate_metrics(module)
        self._kept = Kept(module)
        built: nn.Module = module
        return built

    def train_data(self) -> Dataset[Any]:
        from torch.utils.data import default_collate

        loader = one_loader(self._prepared().train_dataloader(), "train_dataloader")
        self._loader_settings = settings_of(loader, "batch_size")
        self._collate = loader.collate_fn
        if self._collate is not default_collate:
            self.collate = self._collate  # type: ignore[method-assign]
        dataset: Dataset[Any] = loader.dataset
        return dataset

    def eval_data(self) -> Dataset[Any] | None:
        name = "test_dataloader" if self._stage == "test" else "val_dataloader"
        if not _overrides(self._module, f"{self._part}_step"):
            return None
        if not _overrides(self._prepared(), name):
            return None
        loader = one_loader(getattr(self._prepared(), name)(), name)
        if not alike(loader.collate_fn, self._collate):
            raise TaskError(
                "training and validation have different collate functions",
                expected="one collate_fn for both",
                found=f"{self._collate!r} and {loader.collate_fn!r}",
                fix="give both loaders the same collate_fn",
            )
        self._loader_settings |= held_out_settings_of(loader, name)
        dataset: Dataset[Any] = loader.dataset
        return dataset

    def loader_settings(self) -> Mapping[str, Any]:
        return self._loader_settings

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        with self._running(model, "fit", "training_step", None):
            found = _call(model.training_step, batch, self._batch_idx)
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
        self.scheduler_metric = configured.monitor
        return bind(configured.optimizer, self._module, params)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """The schedule of configure_optimizers, which is called anew for each schedule."""
        configured = Configured.of(self._module)
        return None if configured.scheduler is None else Following(optimizer, configured)

    def metrics(self, model: Any, batch: Any) -> Mapping[str, torch.Tensor | float]:
        """The numbers that validation_step logs, each weighted by the samples of its batch.

        The parcel of the batch is kept for `outputs`, which is called next for the same batch, so
        that the step runs once.
        """
        logged = Logged(self._kept, model)
        step = f"{self._part}_step"
        with self._running(model, self._stage, step, logged):
            for moment in ("start", "epoch_start"):
                self._hook(model, f"on_{self._part}_{moment}")
            _call(getattr(model, step), batch, self._batch_idx)
        wanted = logged.metrics or self._has_epoch_end
        self._left = [{**self._kept.parcel(model), "logged": logged.metrics}] if wanted else []
        self._kept.roll_back(model)
        return logged.numbers

    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """The parcel that `metrics` has kept, assigned to the batch's first sample."""
        assert self._trainer.position is not None
        left, self._left = self._left, []
        return {"left": [*left, *[None] * (self._trainer.position.samples - 1)]} if left else {}

    def score(self, outputs: dict[str, Any]) -> Mapping[str, float]:
        """The metrics over all batches, and what on_validation_epoch_end logs."""
        import torch

        module, kept = self._module, self._kept
        parcels = [parcel for parcel in outputs["left"] if parcel is not None]
        hook = f"on_{self._part}_epoch_end"
        logged = Logged(kept, module)
        with torch.no_grad(), self._running(module, self._stage, hook, logged):
            kept.unpack(module, parcels)
            for name, metric in parcels[0]["logged"].items():
                logged.log(name, module.get_submodule(metric).compute())
            self._hook(module, hook)
        kept.check_carried(module, parcels, hook)
        for name, metric in logged.metrics.items():
            logged.log(name, module.get_submodule(metric).compute())
        kept.roll_back(module)
        return {name: float(value) for name, value in logged.numbers.items()}

    def predict(self, model: Any, batch: Any) -> Sequence[Mapping[str, Any]]:
        """What predict_step returns, under its own names or as `prediction`."""
        assert self._trainer.position is not None
        with self._running(model, "predict", "predict_step", None):
            found = _call(model.predict_step, batch, self._batch_idx)
        return rows_of(found, self._trainer.position.samples)

    @property
    def _batch_idx(self) -> int:
        return 0 if self._trainer.position is None else self._trainer.position.batch

    @property
    def _has_epoch_end(self) -> bool:
        name = f"on_{self._part}_epoch_end"
        return name not in self._skip and _overrides(self._module, name)

    def _hook(self, module: Any, name: str) -> None:
        if name not in self._skip:
            getattr(module, name)()

    @contextlib.contextmanager
    def _running(
        self, module: Any, stage: Stage, method: str, logged: Logged | None
    ) -> Iterator[None]:
        """Run a method of the module with the trainer stub, logging to `logged` or nowhere.

        The module's metrics and lists begin as they were built, so that no batch sees another's.
        """
        self._kept.roll_back(module)
        module.trainer, self._trainer.stage = self._trainer, stage
        before = held(module)
        with logging_to(module, logged):
            yield
        check_held(module, before, method)


def _overrides(owner: Any, name: str) -> bool:
    """Whether an object overrides Lightning's method: in its class, or in the object itself, as
    `LightningDataModule.from_datasets` does."""
    method = getattr(type(owner), name, None)
    of_class = method is not None and not method.__module__.startswith(OURS)
    return of_class or name in vars(owner)


OURS = ("lightning.", "pytorch_lightning.")
"""The prefixes of the names of Lightning's modules."""


def _call(step: Callable[..., Any], batch: Any, index: int) -> Any:
    """Call `training_step(batch)` or `training_step(batch, batch_idx)`, as its signature has it.

    A third parameter, dataloader_idx, is 0, since there is one loader.
    """
    positional = [p for p in inspect.signature(step).parameters.values() if p.kind in POSITIONAL]
    wanted = [p for p in positional if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    indices = len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in positional)
    more = max(len(wanted) - 1, indices)
    return step(batch, *[index, *[0] * (more - 1)][:more])


POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    inspect.Parameter.VAR_POSITIONAL,
)
