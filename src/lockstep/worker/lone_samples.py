"""Lone samples: BatchNorm cannot train on a shard that has one value per channel.

A data epoch's last batch may leave one sample to a shard. PyTorch raises an error then, at the end
of the first epoch; here the first forward pass tells that it would, and what avoids it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lockstep.errors import TaskError
from lockstep.planning.sampling import Sampling


class LoneSamples:
    """Looks at what BatchNorm is given in this worker's first shard."""

    def __init__(self, model: nn.Module, sampling: Sampling, steps: int) -> None:
        """`steps`: those of the run, which may end before a short batch comes."""
        self._sampling = sampling
        full = steps < sampling.steps_per_epoch
        risky = sampling.has_lone_sample(first_only=full)
        self._norms = [
            (name, module)
            for name, module in model.named_modules()
            if risky and isinstance(module, _BatchNorm)
        ]

    @contextlib.contextmanager
    def watching(self, samples: int) -> Iterator[None]:
        """Look at a forward pass over a shard of so many samples, once.

        Raises:
            TaskError: from within that pass, when BatchNorm takes one value per channel and sample.
        """
        norms, self._norms = self._norms, []
        with contextlib.ExitStack() as hooks:
            for name, module in norms:
                hook = self._hook(name, samples)
                hooks.callback(module.register_forward_pre_hook(hook).remove)
            yield

    def _hook(self, name: str, samples: int) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...]) -> None:
            value = args[0] if args else None
            if not module.training or not isinstance(value, torch.Tensor) or value.dim() < 2:
                return
            if value.numel() == samples * value.shape[1]:
                raise self._refusal(name, module)

        return look

    def _refusal(self, name: str, module: nn.Module) -> TaskError:
        sampling = self._sampling
        last = sampling.batch_samples(sampling.steps_per_epoch - 1)
        return TaskError(
            f"a shard of one sample would reach {type(module).__name__} {name}, which needs "
            "several values per channel",
            expected="two samples or more in every shard of every batch",
            found=f"{sampling.samples} samples in batches of {sampling.batch_size}: the last step "
            f"of a data epoch has {last}, in {sampling.shards} shards",
            fix="; or ".join(_remedies(sampling)),
        )


def _remedies(sampling: Sampling) -> list[str]:
    """What leaves no shard with one sample."""
    samples, size, shards = sampling.samples, sampling.batch_size, sampling.shards

    def fits(batch_size: int, shards: int) -> bool:
        left = 0 if sampling.drop_last else samples % batch_size
        return batch_size >= 2 * shards and (left == 0 or left >= 2 * shards)

    found = []
    if size >= 2 * shards:
        found.append(f"set drop_last, which leaves out {samples % size} of {samples} samples")
    near = sorted(range(1, min(4 * size, samples) + 1), key=lambda other: abs(other - size))
    better = next((other for other in near if fits(other, shards)), None)
    fewer = next((other for other in range(shards - 1, 0, -1) if fits(size, other)), None)
    if better is not None:
        found.append(f"set batch_size to {better}")
    if fewer is not None:
        found.append(f"set shards to {fewer}")
    return found or ["add samples"]
