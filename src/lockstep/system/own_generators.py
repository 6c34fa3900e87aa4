"""Own generators: random number generators that the user's objects hold, found and seeded.

The global generators are seeded before each sample and each shard (see `seeding`), so that draws
do not depend on who computes what. The same is done here to generators that a data set, a
transform, a `collate` or a task owns. They are found by their types, once.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import numpy as np
import torch

from lockstep.errors import TaskError
from lockstep.system.object_graph import walk
from lockstep.system.seeding import derive, seed_everything

Seed = Callable[[int], object]
"""Seeds one generator with a 63-bit number."""
_KINDS = (random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)
_BITS = (
    np.random.MT19937, np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64,
)  # fmt: skip


class OwnGenerators:
    """The generators that are reached from some objects, under their paths."""

    def __init__(self, roots: Mapping[str, object]) -> None:
        """Find them.

        Raises:
            TaskError: one of them cannot be seeded.
        """
        self._seeds: list[tuple[str, Seed]] = []
        known = set(map(id, _seeded_anyway()))
        for path, value in walk(roots):
            is_one = isinstance(value, _KINDS) or type(value) is torch.Generator
            if is_one and id(_bits(value)) not in known:
                known.add(id(_bits(value)))
                self._seeds.append((path, _seed_of(path, value)))

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self._seeds]

    def seed(self, value: int) -> None:
        """Seed each one, by `value` and its path."""
        for path, seed in self._seeds:
            seed(derive(value, path))

    def seed_all(self, value: int) -> None:
        """Seed each one, and the global generators."""
        if self._seeds:
            self.seed(value)
        seed_everything(value)


def _seeded_anyway() -> list[object]:
    """The global generators."""
    return [torch.default_generator, random._inst, _bits(np.random.mtrand._rand)]


def _bits(value: object) -> object:
    """What holds the generator's state: several may share it."""
    if isinstance(value, np.random.Generator):
        return value.bit_generator
    if isinstance(value, np.random.RandomState):
        return value._bit_generator
    return value


def _seed_of(path: str, value: object) -> Seed:
    """How a generator is seeded: by its type, not by its own methods, which may be overridden."""
    if isinstance(value, torch.Generator):
        return value.manual_seed
    if isinstance(value, random.Random) and _is_plain(type(value)):
        return lambda seed: random.Random.seed(value, seed)
    bits = _bits(value)
    kind = type(bits)
    if isinstance(value, np.random.RandomState):
        if kind is np.random.MT19937:
            return lambda seed: np.random.RandomState.seed(value, seed & 0xFFFFFFFF)
    elif kind in _BITS:

        def put(seed: int) -> None:
            bits.state = kind(seed).state  # type: ignore[attr-defined]

        return put
    raise TaskError(
        f"{path} is a random number generator that cannot be seeded",
        expected="random.Random, a generator of NumPy or torch, or the global ones",
        found=f"{type(value).__module__}.{type(value).__qualname__}",
        fix="use another: it is seeded for each sample and each shard, so that the draws do not "
        "depend on who computes them",
    )


def _is_plain(kind: type[random.Random]) -> bool:
    """Whether a subclass has the state and the draws of `random.Random`."""
    return kind.random is random.Random.random and kind.getrandbits is random.Random.getrandbits
