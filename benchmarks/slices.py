"""Slices on one worker: what a shard costs in T slices, compared with the plain module.

Both are computed in one process, one right after the other, so that both meet the same neighbours;
the ratio is the median of the pairs'. Gradients are copied into a slot and dropped as soon as they
are there, and memory is kept, as in a worker.

python -m benchmarks.slices [--width 1024] [--slices 4] [--passes 100]
python -m benchmarks.slices --team 2 [--width 4096] [--batch 8] [--layers 4]: see `teams`
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.teams import show
from lockstep.slices.cuts import choose_cuts
from lockstep.slices.slicing import slice_model
from lockstep.slices.words import words_of
from lockstep.system.shared_memory import set_allocator

BATCHES = (8, 16, 32, 64, 128)
WARM = 5
"""Passes that do not count."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of the processor: medians over the passes, and that of their ratios."""

    plain: float
    sliced: float
    ratio: float


def mlp(width: int) -> nn.Module:
    """Four square layers."""
    layers = [nn.Linear(width, width) for _ in range(4)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))


def encoder(width: int) -> nn.Module:
    """One of torch's transformer layers, without dropout."""
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 1)


def sliced(model: nn.Module, slices: int) -> nn.Module:
    found = copy.deepcopy(model)
    slice_model(found, choose_cuts(found, slices, words_of(found, None), {}), slices)
    return found


def measure(model: nn.Module, x: torch.Tensor, slices: int, passes: int) -> Cost:
    """Forward and backward of one batch, plain and sliced."""
    models = {1: copy.deepcopy(model), slices: sliced(model, slices)}
    for each in models.values():
        _drop_gradients(each)
    taken: dict[int, list[float]] = {count: [] for count in models}
    for number in range(WARM + passes):
        for count in (1, slices) if number % 2 else (slices, 1):
            begun = time.thread_time()
            models[count](x).square().mean().backward()
            if number >= WARM:
                taken[count].append(time.thread_time() - begun)
    pairs = zip(taken[1], taken[slices], strict=True)
    return Cost(
        plain=statistics.median(taken[1]),
        sliced=statistics.median(taken[slices]),
        ratio=statistics.median(other / plain for plain, other in pairs),
    )


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        slot = torch.zeros_like(parameter)

        def keep(leaf: Any, slot: torch.Tensor = slot) -> None:
            slot.copy_(leaf.grad)
            leaf.grad = None

        parameter.register_post_accumulate_grad_hook(keep)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int)
    parser.add_argument("--slices", type=int, default=4)
    parser.add_argument("--passes", type=int)
    parser.add_argument("--team", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    asked = parser.parse_args()
    if asked.team:
        show(asked.width or 4096, asked.batch, asked.layers, asked.team, asked.passes or 20)
    else:
        show_slices(asked.width or 1024, asked.slices, asked.passes or 100)


def show_slices(width: int, slices: int, passes: int) -> None:
    """Print what slices cost on one worker."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'model':<22} {'batch':<8} {'plain ms':>9} {'sliced ms':>9} {'ratio':>7}")
    for name, model, shapes in (
        ("MLP, 4 layers", mlp(width), [(batch,) for batch in BATCHES]),
        ("transformer encoder", encoder(width), [(1, 32), (4, 32)]),
    ):
        for shape in shapes:
            x = torch.randn(*shape, width)
            cost = measure(model, x, slices, passes)
            print(
                f"{name:<22} {'x'.join(map(str, shape)):<8} {1e3 * cost.plain:>9.2f} "
                f"{1e3 * cost.sliced:>9.2f} {cost.ratio:>7.3f}"
            )


if __name__ == "__main__":
    environment = dict(os.environ)
    set_allocator(environment)
    if environment != os.environ:  # the allocator reads it when a process starts
        command = [sys.executable, "-m", "benchmarks.slices", *sys.argv[1:]]
        os.execve(sys.executable, command, environment)
    main()
