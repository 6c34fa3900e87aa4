"""What a LightningModule knows of its run and keeps between batches, beside plain loops."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

import lockstep
from lockstep.errors import JobError, TaskError
from lockstep.job.faults import Fault
from lockstep.job.position import Position
from lockstep.job.task import Parameters
from tests.adapters.test_lightning import PlainNet, lightning_classes
from tests.adapters.test_module import NUMBERS, assert_same
from tests.support import reference_loop as reference
from tests.support.harmed_runs import events
from tests.support.named_tasks import blobs
from tests.support.reference_loop import fetch


@functools.cache
def knowing_class() -> Any:
    """A module that asks its Trainer for numbers, as real ones do."""
    net_class, _ = lightning_classes()

    class Knowing(net_class):  # type: ignore[misc, valid-type]
        def on_train_start(self) -> None:
            self.logger.log_hyperparams({"layers": len(self.layers)})
            self.log("layers", len(self.layers))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = functional.cross_entropy(self.layers(batch[0]), batch[1])
            self.logger.experiment.add_scalar("loss", loss, self.global_step)
            if self.trainer.is_global_zero and batch_idx == 0:
                self.print("data epoch", self.current_epoch)
            return loss * rising(self.current_epoch, self.global_step, batch_idx)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            steps = self.trainer.estimated_stepping_batches
            assert steps <= self.trainer.max_epochs * self.trainer.num_training_batches
            scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=steps + 1)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Knowing


def rising(data_epoch: int, step: int, batch: int) -> float:
    return 1 + 0.1 * data_epoch + 0.01 * step + 0.001 * batch


class PlainKnowing(PlainNet):
    scheduler_interval: Literal["step", "data_epoch"] = "step"

    def set_position(self, position: Position) -> None:
        self.position = position

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        loss = functional.cross_entropy(model(batch[0]), batch[1])
        return loss * rising(self.position.data_epoch, self.position.step, self.position.batch)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return OneCycleLR(optimizer, max_lr=0.2, total_steps=self.position.steps + 1)


def weights_of(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.long
def test_the_numbers_of_the_run(run_folders: Callable[[], str]) -> None:
    """Steps, data epochs and batches are the run's own, whoever computes them, a replay's too."""
    _, data_class = lightning_classes()
    net = knowing_class()()
    plain = PlainKnowing(weights_of(net))
    make = functools.partial(lockstep.from_lightning, net, data_class())
    assert_same(make, plain, run_folders, among=(1, 2))
    result = lockstep.run(
        make(), workers=3, shards=3, threads=1, quiet=True, out=run_folders(),
        faults=(Fault(worker_id=1, step=4, phase="backward"),), **NUMBERS,
    )  # fmt: skip
    assert len(result.recoveries) == 1
    wanted = reference.train(plain, shards=3, **NUMBERS)
    assert (result.folder / "model.safetensors").read_bytes() == wanted.file()
    assert lockstep.verify(result.folder, steps=(2, 6), task=make()).last == 6


def test_an_optimizer_of_a_copy() -> None:
    """With local steps a worker trains a copy of the module: its parameters, not the module's."""
    net_class, data_class = lightning_classes()
    task = lockstep.from_lightning(net_class(), data_class())
    trained = copy.deepcopy(task.model())
    optimizer = task.optimizer(Parameters(trained.named_parameters()))
    (group,) = optimizer.param_groups
    assert list(map(id, group["params"])) == list(map(id, trained.parameters()))


@functools.cache
def measuring_class() -> Any:
    """A module that is validated in all ways that keep something between batches."""
    net_class, _ = lightning_classes()
    tm = pytest.importorskip("torchmetrics", reason="needs the extra lightning")
    of = tm.classification

    class Measuring(net_class):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.recall = of.MulticlassRecall(num_classes=3)
            self.auroc = of.MulticlassAUROC(num_classes=3)
            self.mean_loss = tm.MeanMetric()
            some = {"f1": of.MulticlassF1Score(3), "precision": of.MulticlassPrecision(3)}
            self.several = tm.MetricCollection(some, prefix="val/")
            self.confusion = of.MulticlassConfusionMatrix(num_classes=3)
            self.train_auroc = of.MulticlassAUROC(num_classes=3)
            self.kept: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            scores = self.layers(batch[0])
            self.train_auroc.update(scores.detach(), batch[1])
            self.log("train/auroc", self.train_auroc)
            self.kept.append(scores)
            return functional.cross_entropy(scores, batch[1])

        def on_validation_epoch_start(self) -> None:
            self.margins: list[Any] = []

        def validation_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            scores, labels = self.layers(batch[0]), batch[1]
            loss = functional.cross_entropy(scores, labels)
            self.recall(scores, labels)
            self.auroc.update(scores, labels)
            self.mean_loss(loss, weight=len(labels))
            self.several.update(scores, labels)
            self.confusion.update(scores, labels)
            self.log("val/recall", self.recall, on_epoch=True, prog_bar=True)
            self.log_dict(self.several, batch_size=len(labels))
            self.log("val/loss", loss)
            self.kept.append({"scores": scores, "batch": (batch_idx, "held out")})
            self.margins.append(scores.max().item())
            return loss

        def on_validation_epoch_end(self) -> None:
            self.log("val/auroc", self.auroc.compute())
            self.log("val/mean_loss", self.mean_loss)
            self.log("val/right", self.confusion.compute().diag().sum())
            scores = torch.cat([each["scores"] for each in self.kept])
            self.log("val/median", scores.median())
            self.log("val/margin", max(self.margins))
            assert [each["batch"][0] for each in self.kept] == [0, 1, 2, 3]
            self.kept.clear()
            self.auroc.reset()

    return Measuring


def in_one_process(net: Any, data: Any, batch_size: int, task: Any) -> dict[str, float]:
    """Validate as Lightning does: batch by batch, then the end of the epoch."""
    found: dict[str, float] = {}
    objects: dict[str, Any] = {}

    def log(name: str, value: Any, **options: Any) -> None:
        if isinstance(value, float | int) or torch.is_tensor(value):
            found[name] = float(value)
        else:
            objects[name] = value

    def log_dict(values: Any, **options: Any) -> None:
        for name, value in values.items():
            log(name, value)

    net.log, net.log_dict = log, log_dict
    net.kept.clear()
    net.on_validation_epoch_start()
    with torch.no_grad():
        for number, start in enumerate(range(0, len(data), batch_size)):
            rows = range(start, min(start + batch_size, len(data)))
            net.validation_step(fetch(task, data, 0, -1, rows), number)
        net.on_validation_epoch_end()
    found |= {name: float(metric.compute()) for name, metric in objects.items()}
    del found["val/loss"]  # of the last batch
    return found


@pytest.mark.long
def test_metrics_and_lists_of_validation(run_folders: Callable[[], str]) -> None:
    """Exactly what one process makes of the same batches, for any number of workers."""
    _, data_class = lightning_classes()
    net = measuring_class()()
    settings: dict[str, Any] = {**NUMBERS, "shards": 3, "threads": 1, "quiet": True}
    strike = (Fault(worker_id=1, step=8, phase="evaluate"),)
    results = [
        lockstep.run(
            lockstep.from_lightning(net, data_class()),
            workers=workers, out=run_folders(), faults=faults, **settings,
        )
        for workers, faults in ((1, ()), (2, ()), (3, strike))
    ]  # fmt: skip
    assert len(events(results[2].folder, "died")) == 1
    assert all(result.history == results[0].history for result in results[1:])
    assert len({result.fingerprint for result in results}) == 1
    trained = measuring_class()()
    trained.load_state_dict(results[0].model().state_dict())
    task = lockstep.from_lightning(net, data_class())
    wanted = in_one_process(trained.eval(), blobs(30, seed=2), 8, task)
    assert len(wanted) == 8
    assert wanted.items() <= results[0].metrics.items()
    assert "val/loss" in results[0].metrics


def best(net: Any) -> None:
    net.log("best", net.best_recall(net.recall.compute()))


def count(net: Any) -> None:
    net.number += 1


@pytest.mark.parametrize(
    ("hook", "says"),
    [(best, r"one evaluation to the next(?s:.)*self.best_recall"), (count, r"self.number: 0 -> 1")],
)
def test_what_lasts_from_one_evaluation_to_the_next(hook: Callable[[Any], None], says: str) -> None:
    _, data_class = lightning_classes()
    tm = pytest.importorskip("torchmetrics")
    net = type("Net", (measuring_class(),), {"on_validation_epoch_end": hook})()
    net.best_recall, net.number = tm.MaxMetric(), 0
    with pytest.raises(TaskError, match=says):
        evaluated_once(lockstep.from_lightning(net, data_class()))
    net.number = 0
    skip = ["on_validation_epoch_end"]
    found = evaluated_once(lockstep.from_lightning(net, data_class(), skip=skip))
    assert found.keys() == {"val/recall", "val/f1", "val/precision"}


def evaluated_once(task: lockstep.Task) -> Mapping[str, float]:
    """What `score` makes of one batch, as a worker calls the methods."""
    model = task.model()
    batch = torch.utils.data.default_collate([blobs(6, seed=2)[index] for index in range(6)])
    beginning = Position(training=True, step=0, steps=9, steps_per_epoch=4, batch=0, samples=6)
    task.set_position(beginning.at_batch(4, 0, 6))
    task.metrics(model, batch)
    return task.score({name: list(v) for name, v in task.outputs(model, batch).items()})


@pytest.mark.parametrize(
    ("kept", "begins"),
    [
        (lambda beta: beta + 1, 0.0),
        (lambda _: torch.ones(1), None),
        (torch.exp_, torch.ones(1)),
        (lambda beta: beta["all"].append(1) or beta, {"all": []}),
    ],
)
def test_a_training_step_that_remembers(kept: Callable[[Any], Any], begins: Any) -> None:
    """A counter, the last hidden state: another worker would have another."""
    net_class, data_class = lightning_classes()

    class Net(net_class):  # type: ignore[misc, valid-type]
        beta: Any

        def training_step(self, batch: Any) -> Any:
            self.beta = kept(self.beta)
            return self.layers(batch[0]).sum()

    net = Net()
    net.beta = begins
    task = lockstep.from_lightning(net, data_class())
    with pytest.raises(TaskError, match=r"something in self.beta(?s:.)*self.global_step"):
        task.loss(task.model(), [torch.zeros(4, 8)])


def test_predict_and_test(run_folder: str, tmp_path: Path) -> None:
    """predict_step makes rows of a file; test_step and its loader are what is evaluated."""
    net_class, data_class = lightning_classes()

    class Net(net_class):  # type: ignore[misc, valid-type]
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            assert self.trainer.predicting
            scores = self.layers(batch)
            return {"label": scores.argmax(1), "scores": scores}

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("right", (self.layers(batch[0]).argmax(1) == batch[1]).float().mean())

        def on_test_epoch_end(self) -> None:
            self.log("ended", 1.0)

        def test_dataloader(self) -> Any:
            raise AssertionError("the data module has it")

    class Data(data_class):  # type: ignore[misc, valid-type]
        def test_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(blobs(20, seed=3))

    make = functools.partial(lockstep.from_lightning, Net(), Data())
    result = lockstep.run(
        make(), out=run_folder, workers=2, shards=2, threads=1, quiet=True, **NUMBERS
    )
    points = blobs(21, seed=4).tensors[0]
    data = tmp_path / "points.jsonl"
    data.write_text("".join(json.dumps({"point": row}) + "\n" for row in points.tolist()))
    task = make(from_record=lambda record: torch.tensor(record["point"]))
    out = tmp_path / "rows.jsonl"
    lockstep.predict(run_folder, data, out=out, workers=2, task=task, quiet=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    model: Any = result.model().eval()
    with torch.no_grad():
        wanted = torch.cat([model.layers(batch) for batch in points.split(8)])
    assert torch.tensor([row["scores"] for row in rows]).equal(wanted)
    assert [row["label"] for row in rows] == wanted.argmax(1).tolist()

    other = type("Other", (Net,), {"on_test_batch_end": lambda net: None})()
    lockstep.from_lightning(other, Data())
    with pytest.raises(TaskError, match="on_test_batch_end"):
        lockstep.from_lightning(other, Data(), test=True)
    found = lockstep.evaluate(run_folder, task=make(test=True))
    assert found.samples == 20
    assert found.metrics.keys() == {"right", "ended"}


def test_a_module_with_its_own_loaders() -> None:
    net_class, _ = lightning_classes()

    class Net(net_class):  # type: ignore[misc, valid-type]
        def setup(self, stage: str) -> None:
            self.train_set = blobs(56, seed=1)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(self.train_set)

    task = lockstep.from_lightning(Net())
    task.model()
    assert len(task.train_data()) == 56  # type: ignore[arg-type]
    assert task.eval_data() is None


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda net: net.optimizers(), r"self.trainer.strategy(?s:.)*self.optimizers\(\)"),
        (lambda net: net.trainer.callback_metrics, "self.trainer.callback_metrics"),
        (lambda net: net.trainer.max_epochs, "max_epochs is not known yet"),
    ],
)
def test_what_only_a_trainer_knows(ask: Callable[[Any], Any], says: str) -> None:
    net_class, data_class = lightning_classes()
    net = type("Net", (net_class,), {"configure_model": ask})()
    with pytest.raises(TaskError, match=says):
        lockstep.from_lightning(net, data_class()).model()


def test_skip_names_hooks() -> None:
    net_class, data_class = lightning_classes()
    net = type("Net", (net_class,), {"on_train_epoch_end": lambda net: None})()
    assert lockstep.from_lightning(net, data_class(), skip=["on_train_epoch_end"]).model() is net
    with pytest.raises(JobError, match=r"not hooks(?s:.)*on_train_epoch_ends"):
        lockstep.from_lightning(net, data_class(), skip=["on_train_epoch_ends"])
    with pytest.raises(TaskError, match=r"skip=\['on_train_epoch_end'\]"):
        lockstep.from_lightning(net, data_class())


def test_a_schedule_that_waits_for_a_metric(run_folders: Callable[[], str]) -> None:
    """A plateau with the metric that `monitor` names, stepped after every second data epoch."""
    net_class, data_class = lightning_classes()

    class Net(net_class):  # type: ignore[misc, valid-type]
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            plateau = plateau_of(optimizer)
            schedule = {"scheduler": plateau, "monitor": "val_loss", "frequency": 2}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    class Plain(PlainNet):
        scheduler_metric = "val_loss"

        def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
            return EverySecond(plateau_of(optimizer))

    net = Net()
    settings: dict[str, Any] = {
        "data_epochs": 6,
        "shards": 2,
        "threads": 1,
        "seed": 2,
        "quiet": True,
    }
    found = lockstep.run(
        lockstep.from_lightning(net, data_class()), workers=2, out=run_folders(), **settings
    )
    plain = Plain(weights_of(net))
    wanted = lockstep.run(plain, workers=1, batch_size=4, out=run_folders(), **settings)
    assert found.history == wanted.history
    for name in ("model.safetensors",):
        assert (found.folder / name).read_bytes() == (wanted.folder / name).read_bytes()
    assert b'"evaluated":84' in (found.folder / "ledger.jsonl").read_bytes()


def plateau_of(optimizer: torch.optim.Optimizer) -> Any:
    return ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)


class EverySecond:
    """Steps a schedule that waits every second time."""

    waits = True

    def __init__(self, schedule: Any) -> None:
        self.schedule, self.count = schedule, 0

    def step(self, value: float) -> None:
        self.count += 1
        if self.count % 2 == 0:
            self.schedule.step(value)
