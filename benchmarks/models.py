"""The six models of the benchmark: how to build each, its data, and how much a worker draws.

The models are small on purpose: what is measured is the overhead of a step over its arithmetic.
Data are random tensors in memory, so that no contender waits for a disk; every contender draws
its batches with `Draw`, or by Lockstep's equal rule for a `TensorDataset`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import lockstep

SAMPLES = 8192
"""Samples in each data set: every batch size here divides it."""
WORLD = 2
"""Workers of every two-process contender."""
Named = Sequence[tuple[str, nn.Parameter]]
"""Trainable parameters with their names in the model."""


class Lookup(nn.Module):
    """A table of 200,000 rows of 32, eight features a sample, and a small classifier on top."""

    rows, width, features, sparse = 200_000, 32, 8, False

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(self.rows, self.width, sparse=self.sparse)
        self.head = nn.Sequential(
            nn.Linear(self.width * self.features, 64), nn.ReLU(), nn.Linear(64, 2)
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits `[n, 2]` of row numbers `[n, 8]`, int64."""
        logits: torch.Tensor = self.head(self.table(rows).flatten(1))
        return logits


class SparseLookup(Lookup):
    """The same with a million rows of 64, whose gradients are sparse."""

    rows, width, sparse = 1_000_000, 64, True


class TinyTransformer(nn.Module):
    """Two encoder layers of width 128 with four heads, over 64 tokens; classes from the mean."""

    tokens, length, classes = 1000, 64, 10

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.embed = nn.Embedding(self.tokens, width)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(width, self.classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[n, 10]` of token numbers `[n, 64]`, int64."""
        logits: torch.Tensor = self.out(self.encoder(self.embed(tokens)).mean(1))
        return logits


Batch = tuple[torch.Tensor, torch.Tensor]
"""Inputs and labels."""


def _softmax() -> nn.Module:
    return nn.Linear(784, 10)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def adam(named: Named) -> torch.optim.Optimizer:
    """Adam for all parameters."""
    return torch.optim.Adam([p for _, p in named], lr=1e-3, fused=True)


def sparse_adam(named: Named) -> torch.optim.Optimizer:
    """SparseAdam for the tables, which touches the rows that were looked up, and Adam for what is
    on top of them."""
    tables = [p for name, p in named if name.startswith("table.")]
    others = [(name, p) for name, p in named if not name.startswith("table.")]
    return lockstep.Together(torch.optim.SparseAdam(tables, lr=1e-3), adam(others))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model with its inputs, and the optimizer of every contender."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of one sample."""
    values: int | None
    """Inputs are int64 below this; None: float32, standard normal."""
    classes: int
    batch: int
    """Samples per worker and step; a global batch is `WORLD` times that."""
    optimizer: Callable[[Named], torch.optim.Optimizer] = adam

    def model(self) -> nn.Module:
        """The model, freshly initialised, the same one each time."""
        torch.manual_seed(0)
        return self.build()

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All inputs `[SAMPLES, *shape]` and labels `[SAMPLES]`, the same ones each time."""
        generator = torch.Generator().manual_seed(1)
        size = (SAMPLES, *self.shape)
        if self.values is None:
            inputs = torch.randn(size, generator=generator)
        else:
            inputs = torch.randint(self.values, size, generator=generator)
        return inputs, torch.randint(self.classes, (SAMPLES,), generator=generator)

    def draw(self, batch: int, rank: int = 0, world: int = 1) -> Draw:
        """What gives a process its batches."""
        return Draw(self.tensors(), batch, rank, world)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of one batch: a scalar with a graph."""
        inputs, labels = batch
        return F.cross_entropy(model(inputs), labels)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Use the gradients."""
        optimizer.step()


LARGE_WIDTH = 640
"""With which the transformer has 10.5 million parameters."""


def large_transformer() -> nn.Module:
    """The transformer, scaled to 10.5 million parameters."""
    return TinyTransformer(LARGE_WIDTH)


CASES: dict[str, Case] = {
    "softmax": Case(build=_softmax, shape=(784,), values=None, classes=10, batch=64),
    "mlp": Case(build=_mlp, shape=(784,), values=None, classes=10, batch=64),
    "cnn": Case(build=_cnn, shape=(1, 28, 28), values=None, classes=10, batch=32),
    "transformer": Case(build=TinyTransformer, shape=(64,), values=1000, classes=10, batch=16),
    "embedding": Case(build=Lookup, shape=(8,), values=Lookup.rows, classes=2, batch=256),
    "sparse": Case(
        build=SparseLookup, shape=(8,), values=SparseLookup.rows, classes=2, batch=256,
        optimizer=sparse_adam,
    ),
}  # fmt: skip

BESIDE: dict[str, Case] = {
    "large": Case(build=large_transformer, shape=(64,), values=1000, classes=10, batch=16),
}
"""For single questions, and not in the table of all contenders."""


def find(name: str) -> Case:
    """The case of this name."""
    return {**CASES, **BESIDE}[name]


class Draw:
    """Batches by slices of a permutation, anew for each pass over the data.

    With `world` > 1, each global batch of `world * batch` samples is cut into equal parts, and
    this gives the one of `rank`.
    """

    def __init__(
        self, tensors: tuple[torch.Tensor, torch.Tensor], batch: int, rank: int = 0, world: int = 1
    ) -> None:
        self._tensors, self._batch, self._offset = tensors, batch, rank * batch
        self._stride = world * batch
        self._generator = torch.Generator().manual_seed(2)
        self._start = self._size = len(tensors[0])
        self._order = torch.empty(0, dtype=torch.int64)

    def __call__(self) -> Batch:
        """The next batch: inputs `[batch, ...]` and labels `[batch]`."""
        if self._start + self._stride > self._size:
            self._order = torch.randperm(self._size, generator=self._generator)
            self._start = 0
        first = self._start + self._offset
        chosen = self._order[first : first + self._batch]
        self._start += self._stride
        inputs, labels = self._tensors
        return inputs.index_select(0, chosen), labels.index_select(0, chosen)


def _size(gradient: torch.Tensor) -> int:
    """Bytes of a gradient: of a sparse one, those of its rows and their numbers."""
    if not gradient.is_sparse:
        return gradient.nbytes
    return gradient._values().nbytes + gradient._indices().nbytes


def sizes(name: str) -> dict[str, int]:
    """Bytes of one copy of the parameters, gradients, Adam's state and the data of a model."""
    case = CASES[name]
    model = case.model()
    optimizer = case.optimizer(list(model.named_parameters()))
    case.loss(model, case.draw(2)()).backward()
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values()]
    return {
        "parameters": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(_size(p.grad) for p in model.parameters() if p.grad is not None),
        "adam_state": sum(t.nbytes for t in state if isinstance(t, torch.Tensor)),
        "data": sum(t.nbytes for t in case.tensors()),
    }
