"""Random numbers of slices: each slice draws its own, whoever computes it.

They are seeded from one number, drawn from the shard's generator where the slices begin, and the
slice's index: so they depend on seed, step, shard and slice, and on nothing else. Who computes some
of the slices alone draws the same number, and the shard's generator goes on alike for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lockstep.system.seeding import derive

_MOST = 1 << 62


@torch.compiler.disable(reason="slices draw random numbers of their own")  # type: ignore[untyped-decorator]
def slice_generators(slices: int) -> Sequence[torch.Generator]:
    """A generator for each slice; draws one number from the default generator."""
    drawn = int(torch.randint(_MOST, ()).item())
    generators = []
    for index in range(slices):
        generator = torch.Generator()
        generator.manual_seed(derive(drawn, "slice", index))
        generators.append(generator)
    return generators


def drop(x: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
    """Dropout in training, with a slice's generator."""
    if p >= 1.0:
        return x * torch.zeros_like(x)
    kept = torch.empty_like(x).bernoulli_(1.0 - p, generator=generator)
    return x * kept.div_(1.0 - p)
