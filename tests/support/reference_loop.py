"""What Lockstep's numbers must be: its documented contract, in one process of plain PyTorch.

Nothing of Lockstep is imported here; only a task's own methods are called. `train` is the contract
for any number of shards. `train_unsharded` is the loop that everybody writes; it must agree where
there is one shard.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
import random
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn
from torch.utils.data import WeightedRandomSampler

Sums = list[tuple[int, dict[str, float]]]


@dataclass
class Outcome:
    """What a training run comes to."""

    model: dict[str, torch.Tensor]
    """The module's state dict."""
    buffers: dict[str, torch.Tensor]
    """Every buffer, also those that the state dict leaves out."""
    state: dict[str, dict[str, Any]]
    """The optimizer's state, by the parameter's name."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evaluations: Sums = field(default_factory=list)
    """`(committed steps, metrics)`."""

    def file(self) -> bytes:
        """The state dict as a safetensors file."""
        tensors = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in self.model.items()
        }
        return save(tensors, metadata={"format": "pt"})


class Params(list[nn.Parameter]):
    """What a task's `optimizer` is given."""

    def __init__(self, model: nn.Module) -> None:
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        super().__init__(parameter for _, parameter in self._named)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        return self._named


# Random numbers and samples.


def derive(seed: int, purpose: str, *numbers: int) -> int:
    text = "/".join(str(part) for part in (seed, purpose, *numbers))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)


def order(seed: int, data_epoch: int, samples: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive(seed, "order", data_epoch))
    indices: list[int] = torch.randperm(samples, generator=generator).tolist()
    return indices


def order_of(task: Any, data: Any, seed: int, data_epoch: int) -> list[int]:
    """The order, or what PyTorch's sampler draws where the task has weights."""
    weights = task.sample_weights(data) if hasattr(task, "sample_weights") else None
    if weights is None:
        return order(seed, data_epoch, len(data))
    generator = torch.Generator().manual_seed(derive(seed, "order", data_epoch))
    return list(WeightedRandomSampler(weights, len(data), generator=generator))


def fetch(
    task: Any, data: Any, seed: int, data_epoch: int, indices: Sequence[int],
    repeats: Sequence[int] = (),
) -> Any:  # fmt: skip
    """The batch of these samples; each is drawn under a seed of its own, and so is each time that
    it is drawn again in the data epoch."""
    if hasattr(data, "__getitems__"):
        seed_all(derive(seed, "sample", data_epoch, indices[0]))
        return task.collate(data.__getitems__(list(indices)))
    samples = []
    for index, again in itertools.zip_longest(indices, repeats, fillvalue=0):
        seed_all(derive(seed, "sample", data_epoch, index, *([again] if again else [])))
        samples.append(data[index])
    return task.collate(samples)


def cut(batch: list[int], shards: int) -> list[list[int]]:
    """A batch as shards, as even as can be."""
    size = len(batch)
    edges = [size * shard // shards for shard in range(shards + 1)]
    return [batch[first:last] for first, last in itertools.pairwise(edges)]


def divide_parts(
    seed: int, data_epoch: int, start: int, stop: int, parts: Sequence[tuple[int, int, int]]
) -> list[list[int]]:
    """The shards of a step that takes the samples `start:stop`: of each part the same fraction."""
    total, before = sum(have for have, _, _ in parts), 0
    divided = []
    for number, (have, _, shards) in enumerate(parts):
        generator = torch.Generator().manual_seed(derive(seed, "order", data_epoch, number))
        drawn = [before + index for index in torch.randperm(have, generator=generator).tolist()]
        divided += cut(drawn[have * start // total : have * stop // total], shards)
        before += have
    return divided


def batches(
    samples: int, batch_size: int, parts: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[int, range]]:
    """The held-out batches, in order: their numbers within their part, and their samples."""
    before = 0
    for have in [held_out for _, held_out, _ in parts] or [samples]:
        for number, start in enumerate(range(0, have, batch_size)):
            yield number, range(before + start, before + min(start + batch_size, have))
        before += have


# Sums.


def pairwise(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The sum along a balanced tree, neighbours first; what is missing is skipped."""
    level = list(values)
    while len(level) > 1:
        level = [add(*level[at : at + 2]) for at in range(0, len(level), 2)]
    return level[0]


def add(left: torch.Tensor | None, right: torch.Tensor | None = None) -> torch.Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def combined(values: Sequence[torch.Tensor | None], weights: Sequence[float]) -> torch.Tensor:
    """What the shards made of one buffer, as one; None for a shard without samples."""
    present = [value for value in values if value is not None]
    first = present[0]
    if len(present) == 1:
        return first
    if first.dtype is torch.uint16:
        return first  # a constant: PyTorch does not compute with it
    if not first.is_floating_point():
        return functools.reduce(torch.maximum, present)
    pairs = zip(values, weights, strict=True)
    mean = pairwise([None if value is None else value * weight for value, weight in pairs])
    agreed = torch.stack([value == first for value in present]).all(0)
    assert mean is not None
    return torch.where(agreed, first, mean)


# Training.


def tell(task: Any, *, training: bool, **numbers: int) -> None:
    """Tell the task where in the run the next calls belong."""
    ended = numbers["step"] if training else max(numbers["step"] - 1, 0)
    data_epoch = ended // numbers["steps_per_epoch"]
    task.set_position(types.SimpleNamespace(training=training, data_epoch=data_epoch, **numbers))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The numerics that a worker with one thread has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def autocast(precision: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


@one_thread()
def train(
    task: Any,
    *,
    batch_size: int,
    steps: int,
    shards: int,
    seed: int,
    clip_grad_norm: float | None = None,
    precision: str = "fp32",
    eval_batch_size: int | None = None,
    parts: Sequence[tuple[int, int, int]] = (),
) -> Outcome:
    """Train `task` as Lockstep's documentation says that it trains.

    `parts`: where the data lies in parts that stay apart, of each in turn the training samples,
    the held-out samples and the shards.
    """
    seed_all(seed)
    model = task.model()
    data, held_out = task.train_data(), task.eval_data()
    params = Params(model)
    steps_per_epoch = math.ceil(len(data) / batch_size)
    run = {"steps": steps, "steps_per_epoch": steps_per_epoch}
    tell(task, training=True, step=0, batch=0, samples=batch_size, **run)
    optimizer = task.optimizer(params)
    scheduler = task.scheduler(optimizer)
    committed = copy_of_buffers(model)
    outcome = Outcome(model={}, buffers={}, state={})

    for step in range(steps):
        data_epoch, place = divmod(step, steps_per_epoch)
        start, stop = place * batch_size, min((place + 1) * batch_size, len(data))
        if parts:
            divided = divide_parts(seed, data_epoch, start, stop, parts)
        else:
            drawn = order_of(task, data, seed, data_epoch)
            divided = cut(drawn[start:stop], shards)
            before = [drawn[:at].count(drawn[at]) for at in range(start, stop)]
            repeats = cut(before, shards)
        size = sum(map(len, divided))
        weights: list[float] = []
        losses: list[float] = []
        grads: list[list[torch.Tensor | None]] = [[] for _ in params]
        buffers: list[dict[str, torch.Tensor | None]] = []

        for shard in range(shards):
            mine = divided[shard]
            weights.append(len(mine) / size)
            for parameter in params:
                parameter.grad = None
            if mine:
                again = () if parts else repeats[shard]
                samples = fetch(task, data, seed, data_epoch, mine, again)
                tell(task, training=True, step=step, batch=place, samples=len(mine), **run)
                seed_all(derive(seed, "shard", step, shard))
                set_buffers(model, committed)
                model.train()
                with autocast(precision):
                    loss = task.loss(model, samples)
                if len(mine) == size:
                    loss.backward()
                else:
                    loss.backward(torch.full_like(loss, len(mine) / size))
                losses.append(loss.item())
                buffers.append({**copy_of_buffers(model)})
            else:
                losses.append(0.0)
                buffers.append(dict.fromkeys(committed))
            for kept, parameter in zip(grads, params, strict=True):
                gradient = parameter.grad
                if gradient is not None and gradient.is_sparse:
                    gradient = gradient.coalesce()
                kept.append(gradient)

        for parameter, kept in zip(params, grads, strict=True):
            parameter.grad = pairwise(kept)
        if clip_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
            outcome.norms.append(norm.item())
        optimizer.step()
        committed = {
            name: combined([shard[name] for shard in buffers], weights) for name in committed
        }
        set_buffers(model, committed)
        outcome.losses.append(weighted_sum(losses, weights))

        ends_epoch = place == steps_per_epoch - 1
        if scheduler and (task.scheduler_interval == "step" or ends_epoch):
            scheduler.step()
        if held_out is not None and (ends_epoch or step == steps - 1):
            metrics = evaluate(
                task, model, held_out, eval_batch_size or batch_size, seed, precision, parts,
                step=step + 1, **run,
            )  # fmt: skip
            outcome.evaluations.append((step + 1, metrics))

    outcome.model = {name: value.detach().clone() for name, value in model.state_dict().items()}
    outcome.buffers = committed
    outcome.state = {name: dict(optimizer.state.get(p, {})) for name, p in params.named()}
    return outcome


def copy_of_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def set_buffers(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(values[name])


def weighted_sum(losses: Sequence[float], weights: Sequence[float]) -> float:
    total = 0.0
    for loss, weight in zip(losses, weights, strict=True):
        total += loss * weight
    return total


def evaluate(
    task: Any,
    model: nn.Module,
    data: Any,
    batch_size: int,
    seed: int,
    precision: str,
    parts: Sequence[tuple[int, int, int]] = (),
    **run: int,
) -> dict[str, float]:
    """The mean of each metric over the samples: once each, in the order of the data."""
    sums: dict[str, float] = {}
    committed = copy_of_buffers(model)
    with torch.no_grad(), autocast(precision):
        for number, indices in batches(len(data), batch_size, parts):
            batch = fetch(task, data, seed, -1, indices)
            tell(task, training=False, batch=number, samples=len(indices), **run)
            seed_all(derive(seed, "eval", number))
            set_buffers(model, committed)
            model.eval()
            for name, value in task.metrics(model, batch).items():
                value = torch.as_tensor(value).double()
                one = value.numel() == 1  # the mean over the batch
                value = value.item() * len(indices) if one else value.sum().item()
                sums[name] = sums.get(name, 0.0) + value
    set_buffers(model, committed)
    model.train()
    return {name: value / len(data) for name, value in sums.items()}


@one_thread()
def train_unsharded(
    task: Any,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    clip_grad_norm: float | None = None,
    precision: str = "fp32",
    eval_batch_size: int | None = None,
) -> Outcome:
    """The loop that everybody writes."""
    seed_all(seed)
    model = task.model()
    data, _ = task.train_data(), task.eval_data()
    params = Params(model)
    steps_per_epoch = math.ceil(len(data) / batch_size)
    run = {"steps": steps, "steps_per_epoch": steps_per_epoch}
    tell(task, training=True, step=0, batch=0, samples=batch_size, **run)
    optimizer = task.optimizer(params)
    scheduler = task.scheduler(optimizer)
    losses, norms = [], []

    for step in range(steps):
        data_epoch, place = divmod(step, steps_per_epoch)
        indices = order(seed, data_epoch, len(data))[place * batch_size : (place + 1) * batch_size]
        batch = fetch(task, data, seed, data_epoch, indices)
        tell(task, training=True, step=step, batch=place, samples=len(indices), **run)
        seed_all(derive(seed, "shard", step, 0))

        model.train()
        model.zero_grad()  # also of what the optimizer leaves out
        with autocast(precision):
            loss = task.loss(model, batch)
        loss.backward()
        if clip_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
            norms.append(norm.item())
        optimizer.step()
        if scheduler and (task.scheduler_interval == "step" or place == steps_per_epoch - 1):
            scheduler.step()
        losses.append(loss.item())

    return Outcome(
        model={name: value.detach().clone() for name, value in model.state_dict().items()},
        buffers=copy_of_buffers(model),
        state={name: dict(optimizer.state.get(p, {})) for name, p in params.named()},
        losses=losses,
        norms=norms,
    )
