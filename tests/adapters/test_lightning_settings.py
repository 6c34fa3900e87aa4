"""`from_lightning`: loaders' settings count, frozen modules stay so, no Trainer is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lockstep
from lockstep.errors import TaskError
from lockstep.planning.plan import Plan
from lockstep.system.seeding import derive, seed_everything


def points(samples: int) -> TensorDataset:
    x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
    return TensorDataset(x, (x[:, 0] > 5).long())


def module_class(samples: int = 22, **loader: Any) -> Any:
    pl = pytest.importorskip("lightning.pytorch", reason="needs the extra lightning")

    class Net(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
            self.head = nn.Linear(8, 2)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("size", float(len(batch[0])))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            return DataLoader(points(samples), **loader)

        def val_dataloader(self) -> Any:
            return DataLoader(points(9), batch_size=5)

    return Net


def plan_of(task: lockstep.Task, **settings: Any) -> Plan:
    return lockstep.plan(task, workers=1, threads=1, **settings)


def test_the_loaders_settings_count() -> None:
    net = module_class(batch_size=4, shuffle=False, drop_last=True)
    plan = plan_of(lockstep.from_lightning(net()))
    assert (plan.batch_size, plan.shuffle, plan.drop_last) == (4, False, True)
    assert (plan.eval_batch_size, plan.steps) == (5, 5)
    assert "drop_last True: that of the task's DataLoader" in plan.reasons


def test_what_is_asked_for_overrides_them_and_says_so() -> None:
    net = module_class(batch_size=4, shuffle=True)
    plan = plan_of(lockstep.from_lightning(net()), batch_size=8, shuffle=False)
    assert (plan.batch_size, plan.shuffle, plan.drop_last) == (8, False, False)
    assert (plan.eval_batch_size, plan.steps) == (8, 3)
    assert "batch_size 8, as asked; the task's DataLoader has 4" in plan.reasons


def test_a_held_out_loader_that_leaves_samples_out_is_refused() -> None:
    net = module_class(batch_size=4)

    class Dropping(net):  # type: ignore[misc, valid-type]
        def val_dataloader(self) -> Any:
            return DataLoader(points(9), batch_size=5, drop_last=True)

    task = lockstep.from_lightning(Dropping())
    task.train_data()
    with pytest.raises(TaskError, match="val_dataloader has drop_last=True"):
        task.eval_data()


def test_batches_are_the_loaders(run_folders: Callable[[], str]) -> None:
    """The order of the data, without the short batch: the plain loop's bytes."""
    net = module_class(batch_size=4, shuffle=False, drop_last=True)()
    task = lockstep.from_lightning(net)
    result = lockstep.run(
        task, workers=1, shards=1, threads=1, data_epochs=2, out=run_folders(), quiet=True,
        evaluate=False,
    )  # fmt: skip
    model = net.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(10):
        seed_everything(derive(0, "shard", step, 0))
        optimizer.zero_grad()
        start = step % 5 * 4
        model.training_step(points(22)[start : start + 4], 0).backward()
        optimizer.step()
    torch.set_num_threads(threads)
    assert result.steps == 10
    for name, value in result.model().state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize(
    "where", ["on_train_start", pytest.param("constructor", marks=pytest.mark.long)]
)
def test_a_backbone_in_eval_mode_stays_so(where: str, run_folders: Callable[[], str]) -> None:
    net = module_class(batch_size=8, shuffle=True)

    class Frozen(net):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.backbone.requires_grad_(False)
            if where == "constructor":
                self.backbone.eval()

        def on_train_start(self) -> None:
            if where == "on_train_start":
                self.backbone.eval()

    with lockstep.preloaded():
        results = [
            lockstep.run(
                lockstep.from_lightning(Frozen()), workers=workers, shards=2, threads=1, seed=3,
                data_epochs=2, out=run_folders(), quiet=True,
            )
            for workers in (1, 2)
        ]  # fmt: skip
    model: Any = results[0].model()
    norm = model.backbone[1]
    assert torch.equal(norm.running_mean, torch.zeros(8))
    assert int(norm.num_batches_tracked) == 0


def test_a_run_is_not_stopped_from_within(run_folders: Callable[[], str]) -> None:
    net = module_class(batch_size=8)

    class Stopping(net):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.trainer.should_stop = self.current_epoch == 1
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            return loss

    with pytest.raises(TaskError, match=r"(?s)sets self\.trainer\.should_stop.*set steps") as error:
        lockstep.run(
            lockstep.from_lightning(Stopping()), workers=2, shards=2, data_epochs=3,
            out=run_folders(), quiet=True,
        )  # fmt: skip
    assert "True" in str(error.value.found)


def test_other_attributes_of_the_trainer_are_not_set() -> None:
    task: Any = lockstep.from_lightning(module_class(batch_size=8)())
    module = task.model()
    with pytest.raises(TaskError, match=r"sets self\.trainer\.limit_val_batches"):
        module.trainer.limit_val_batches = 0
    assert module.trainer.should_stop is False
