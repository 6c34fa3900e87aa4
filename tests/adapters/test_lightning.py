"""`from_lightning`: a LightningModule beside a plain loop, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler

import lockstep
from lockstep.errors import JobError, LockstepError, OptimizerError, TaskError
from lockstep.job.task import Parameters
from lockstep.optim.lr_schedule import LrSchedule
from lockstep.planning.sampling import Sampling
from tests.adapters.test_module import accuracy, assert_same
from tests.support.named_tasks import Blobs, blobs


@functools.cache
def lightning_classes() -> tuple[Any, Any]:
    """A module and its data, defined where Lightning is installed."""
    pl = pytest.importorskip("lightning.pytorch", reason="needs the extra lightning")

    class Net(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, form: str = "epoch") -> None:
            super().__init__()
            self.layers = Blobs().model()
            self.form = form

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            loss = functional.cross_entropy(self.layers(batch[0]), batch[1])
            self.log("train_loss", loss, prog_bar=True)
            return {"loss": loss}

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            scores = self.layers(batch[0])
            self.log("val_loss", functional.cross_entropy(scores, batch[1]))
            self.log_dict({"accuracy": accuracy(scores, batch[1]).float().mean()})

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, step_size=1)}

    class Data(pl.LightningDataModule):  # type: ignore[misc, name-defined]
        def setup(self, stage: str) -> None:
            self.train, self.held_out = blobs(56, seed=1), blobs(30, seed=2)

        def train_dataloader(self) -> Any:
            return DataLoader(self.train, batch_size=4, shuffle=True)

        def val_dataloader(self) -> Any:
            return DataLoader(self.held_out, batch_size=4)

    return Net, Data


class Inner(nn.Module):
    """The plain module of the names that the LightningModule has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = Blobs().model()

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.layers(points)
        return scores


class PlainNet(Blobs):
    """What the module comes to in a plain loop, from the weights that it was made with."""

    scheduler_interval: Literal["step", "data_epoch"] = "data_epoch"

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = weights

    def model(self) -> nn.Module:
        model = Inner()
        model.load_state_dict(self.weights)
        return model

    def train_data(self) -> Dataset[Any]:
        return blobs(56, seed=1)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return StepLR(optimizer, step_size=1)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        scores = model(batch[0])
        return {
            "val_loss": functional.cross_entropy(scores, batch[1]),
            "accuracy": accuracy(scores, batch[1]).float().mean(),
        }


def test_a_lightning_module(run_folders: Callable[[], str]) -> None:
    """A schedule by data epochs (Lightning's default), a dict for a loss, and logged metrics."""
    net_class, data_class = lightning_classes()
    net = net_class()
    plain = PlainNet({name: value.clone() for name, value in net.state_dict().items()})
    assert_same(lambda: lockstep.from_lightning(net, data_class()), plain, run_folders)


def test_hooks_that_most_modules_have() -> None:
    """`setup` of the module is called, before its configure_model; `teardown` may be there."""
    net_class, data_class = lightning_classes()

    class Net(net_class):  # type: ignore[misc, valid-type]
        def setup(self, stage: str) -> None:
            self.classes = {"fit": 3}[stage]

        def configure_model(self) -> None:
            self.layers = nn.Linear(2, self.classes)

        def teardown(self, stage: str) -> None: ...

    class Data(data_class):  # type: ignore[misc, valid-type]
        def teardown(self, stage: str) -> None: ...

    weights = lockstep.from_lightning(Net(), Data()).model().state_dict()
    assert weights["layers.weight"].shape == (3, 2)


def by_steps(optimizer: Any) -> dict[str, Any]:
    return {"scheduler": StepLR(optimizer, 2), "interval": "step"}


@pytest.mark.parametrize(
    ("form", "rates"),
    [
        (lambda o: o, [0.1] * 5),
        (lambda o: [o], [0.1] * 5),
        (lambda o: ([o], [StepLR(o, 1)]), [0.1, 0.1, 0.01, 0.01, 0.001]),
        (lambda o: ([o], [by_steps(o)]), [0.1, 0.1, 0.01, 0.01, 0.001]),
        (lambda o: {"optimizer": o}, [0.1] * 5),
        (lambda o: {"optimizer": o, "lr_scheduler": by_steps(o)}, [0.1, 0.1, 0.01, 0.01, 0.001]),
        (lambda o: [{"optimizer": o, "lr_scheduler": StepLR(o, 1)}], [0.1, 0.1, 0.01, 0.01, 0.001]),
        (
            lambda o: {
                "optimizer": o,
                "lr_scheduler": {"scheduler": StepLR(o, 1), "frequency": 2},
            },
            [0.1, 0.1, 0.1, 0.1, 0.01],
        ),
    ],
)
def test_every_form_of_one_optimizer(form: Callable[[Any], Any], rates: list[float]) -> None:
    """The learning rates of five steps, two to a data epoch."""
    net_class, data_class = lightning_classes()

    class Net(net_class):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            return form(torch.optim.SGD(self.parameters(), lr=0.1))

    task = lockstep.from_lightning(Net(), data_class())
    optimizer = task.optimizer(Parameters(task.model().named_parameters()))
    sampling = Sampling(samples=30, batch_size=16, shards=1, seed=0)
    schedule = LrSchedule(task, optimizer, sampling)
    found = []
    for step in (0, 1, 2, 3, 4):
        schedule.go_to(step)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(rates)
    schedule.go_to(0)
    assert optimizer.param_groups[0]["lr"] == rates[0]


def two_optimizers(net: Any) -> Any:
    return [torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2)]


def on_a_plateau(net: Any) -> Any:
    optimizer = two_optimizers(net)[0]
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return {"optimizer": optimizer, "lr_scheduler": plateau}


@pytest.mark.parametrize(
    ("members", "kind", "says"),
    [
        ({"automatic_optimization": False}, TaskError, "optimizes manually"),
        ({"on_train_batch_end": two_optimizers}, TaskError, "found:    on_train_batch_end"),
        ({"optimizer_step": two_optimizers}, TaskError, "found:    optimizer_step"),
        ({"validation_epoch_end": two_optimizers}, TaskError, "found:    validation_epoch_end"),
        ({"configure_callbacks": two_optimizers}, TaskError, "configure_callbacks"),
        ({"configure_optimizers": two_optimizers}, OptimizerError, "found:    2: SGD, SGD"),
        ({"configure_optimizers": lambda net: None}, OptimizerError, "did not return one"),
        ({"configure_optimizers": on_a_plateau}, TaskError, "ReduceLROnPlateau"),
    ],
)
def test_a_module_that_needs_its_trainer(
    members: dict[str, Any], kind: type[LockstepError], says: str
) -> None:
    net_class, data_class = lightning_classes()
    net = type("Net", (net_class,), members)()
    with pytest.raises(kind, match=says):
        lockstep.from_lightning(net, data_class()).optimizer(Parameters(net.named_parameters()))


@pytest.mark.parametrize(
    ("value", "options"), [(torch.zeros(3), {}), (1.0, {"reduce_fx": "max"}), ("good", {})]
)
def test_what_cannot_be_averaged_is_not_logged(value: Any, options: dict[str, Any]) -> None:
    net_class, data_class = lightning_classes()

    class Net(net_class):  # type: ignore[misc, valid-type]
        def validation_step(self, batch: Any) -> None:
            self.log("odd", value, **options)

    net = Net()
    task = lockstep.from_lightning(net, data_class())
    with pytest.raises(TaskError, match="'odd' is not a number that can be averaged"):
        task.metrics(task.model(), None)
    assert "log" not in vars(net)


def test_what_is_logged_in_training_is_dropped() -> None:
    """Whatever it is: torchmetrics' objects, too."""
    net_class, data_class = lightning_classes()
    import torchmetrics

    class Net(net_class):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(num_classes=3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            scores = self.layers(batch[0])
            self.accuracy(scores, batch[1])
            self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
            return functional.cross_entropy(scores, batch[1])

    net = Net()
    task = lockstep.from_lightning(net, data_class())
    batch = torch.utils.data.default_collate([blobs(8, seed=1)[index] for index in range(8)])
    assert task.loss(task.model(), batch).requires_grad
    assert "log" not in vars(net)


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (lambda net, batch: (batch,), ("b",)),
        (lambda net, batch, batch_idx: (batch, batch_idx), ("b", 7)),
        (lambda net, data, _: (data, _), ("b", 7)),
        (lambda net, batch, i, dataloader_idx: (batch, i, dataloader_idx), ("b", 7, 0)),
        (lambda net, batch, i, stage="val": (batch, i, stage), ("b", 7, "val")),
        (lambda net, *args: args, ("b", 7)),
    ],
)
def test_steps_by_whatever_names(step: Callable[..., Any], wanted: tuple[Any, ...]) -> None:
    """Lightning gives a step its arguments by place."""
    from lockstep.adapters.lightning.task import _call

    net_class, _ = lightning_classes()
    net = type("Net", (net_class,), {"training_step": step})()
    assert _call(net.training_step, "b", 7) == wanted


def test_a_data_module_of_data_sets() -> None:
    """LightningDataModule.from_datasets puts its loaders into the object, not into a class."""
    net_class, _ = lightning_classes()
    import lightning.pytorch as pl

    train, held_out = blobs(56, seed=1), blobs(30, seed=2)
    data = pl.LightningDataModule.from_datasets(train, held_out, batch_size=4)
    task = lockstep.from_lightning(net_class(), data)
    assert task.train_data() is train
    assert task.eval_data() is held_out
    task = lockstep.from_lightning(net_class(), pl.LightningDataModule.from_datasets(train))
    task.train_data()
    assert task.eval_data() is None


def test_a_loader_is_no_data_module() -> None:
    net_class, _ = lightning_classes()
    with pytest.raises(JobError, match=r"(?s)not Lightning's.*LightningDataModule\.from_datasets"):
        lockstep.from_lightning(net_class(), DataLoader(blobs(8, seed=1)))


def test_a_loader_with_an_order_of_its_own() -> None:
    net_class, data_class = lightning_classes()

    class Data(data_class):  # type: ignore[misc, valid-type]
        def train_dataloader(self) -> Any:
            return DataLoader(self.train, sampler=WeightedRandomSampler([1.0] * 56, 56))

    task = lockstep.from_lightning(net_class(), Data())
    with pytest.raises(TaskError, match=r"a sampler of its own\n.*\n.*WeightedRandomSampler"):
        task.train_data()
