"""Small tasks, each with something that could make the bits depend on the number of workers.

`ZOO` has them by name, with their settings. Most share `Vectors`' sizes: 109 samples in batches of
26, so that shards differ in size and the last step of a data epoch has 5 samples, fewer than there
are shards.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, StepLR
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

from lockstep.job import Parameters, Task

SAMPLES, HELD_OUT, BATCH, STEPS = 109, 31, 26, 12
FEATURES, CLASSES = 12, 4


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A task and the settings that its numbers depend on, besides `shards`."""

    task: Task
    batch_size: int = BATCH
    steps: int = STEPS
    seed: int = 3
    clip_grad_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_batch_size: int = 7

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "task"}


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(high: int, *shape: int, seed: int = 2) -> torch.Tensor:
    """Whole numbers from 0 to below `high`."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


# Multi-layer perceptrons, and the optimizers and schedules that they are trained with.


class Vectors(Task):
    """An MLP that classifies vectors, by SGD with Nesterov momentum."""

    inputs: tuple[int, ...] = (FEATURES,)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(normal(SAMPLES, *self.inputs), whole(CLASSES, SAMPLES))

    def eval_data(self) -> Dataset[Any] | None:
        inputs = normal(HELD_OUT, *self.inputs, seed=5)
        return TensorDataset(inputs, whole(CLASSES, HELD_OUT, seed=6), torch.arange(HELD_OUT))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        """`once` comes to `(2 ** HELD_OUT - 1) / HELD_OUT` if every sample is counted once."""
        inputs, labels, number = batch
        outputs = model(inputs)
        return {
            "loss": functional.cross_entropy(outputs, labels),
            "accuracy": outputs.argmax(1) == labels,
            "once": 2.0 ** number.double(),
        }


class By(Vectors):
    """The same by any class of `torch.optim`."""

    def __init__(self, kind: str, **options: Any) -> None:
        self.kind, self.options = kind, options

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(torch.optim, self.kind)(params, **self.options)
        return made


class Matrices(By):
    """Only matrices, and no bias: Muon takes nothing else."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, 16, bias=False), nn.Tanh(), nn.Linear(16, CLASSES, bias=False)
        )


class Scheduled(By):
    """A learning rate that changes with every step, and momentum with it."""

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        return OneCycleLR(optimizer, max_lr=0.05, total_steps=STEPS + 1)


class ByLambda(By):
    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        return LambdaLR(optimizer, lambda step: 1 / (1 + step))


class ByEpoch(By):
    """A learning rate that changes with every data epoch."""

    scheduler_interval = "data_epoch"

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        return StepLR(optimizer, step_size=1, gamma=0.5)


class Wide(By):
    """A weight of 262,144 elements, which is cut into four blocks."""

    inputs = (512,)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES))


class WideBranches(Wide):
    """A cut weight that many shards have no gradient for, and some steps none at all."""

    def model(self) -> nn.Module:
        return Branches(512, 512)


# Parameters that are not there for every shard, or are not the optimizer's.


class Branches(nn.Module):
    """A mixture that sends each sample through one branch; the last is seldom taken."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(features, hidden) for _ in range(3))
        self.unused = nn.Parameter(torch.ones(5))
        self.out = nn.Linear(hidden, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = (x[:, 0] > 0.5).long() + (x[:, 0] > 2.0).long()
        hidden = x.new_zeros(len(x), self.out.in_features)
        for number, layer in enumerate(self.branches):
            mine = branch == number
            if mine.any():
                hidden[mine] = layer(x[mine])
        out: torch.Tensor = self.out(torch.tanh(hidden))
        return out


class Mixture(Vectors):
    def model(self) -> nn.Module:
        return Branches(FEATURES, 8)


class Frozen(By):
    """A first layer that is not trained."""

    def model(self) -> nn.Module:
        model = super().model()
        assert isinstance(model, nn.Sequential)
        model[0].requires_grad_(False)
        return model


class LeftOut(Vectors):
    """A layer that requires gradients, but that the optimizer is not given."""

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        given = [parameter for name, parameter in params.named() if not name.startswith("0.")]
        return torch.optim.SGD(given, lr=0.1, momentum=0.9)


class OddShapes(Vectors):
    """A scalar, an empty tensor, one element, a transposed matrix; and groups out of order."""

    def model(self) -> nn.Module:
        return Odd()

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        named = params.named()
        small = [parameter for _, parameter in reversed(named) if parameter.numel() < 2]
        large = [parameter for _, parameter in named if parameter.numel() >= 2]
        groups: list[dict[str, Any]] = [{"params": small, "lr": 0.1}, {"params": large}]
        return torch.optim.AdamW(groups, lr=0.01)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0))
        self.one = nn.Parameter(torch.ones(1))
        self.weight = nn.Parameter(torch.randn(FEATURES, CLASSES).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight) * self.scale + self.one + self.empty.sum()


class OtherTypes(Vectors):
    """Complex and half parameters, and one of whole numbers that cannot be trained."""

    def model(self) -> nn.Module:
        return Complex()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, CLASSES, dtype=torch.complex64))
        self.shift = nn.Parameter(torch.arange(CLASSES, dtype=torch.int8), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(CLASSES).half())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.complex64) @ self.weight).abs() + self.shift + self.bias.float()


class Average(nn.Module):
    """A layer, and a moving average of it in parameters that are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(FEATURES, CLASSES)
        self.teacher = nn.Linear(FEATURES, CLASSES).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
            with torch.no_grad():
                for slow, fast in pairs:
                    slow.lerp_(fast, 0.1)
        out: torch.Tensor = self.student(x) + self.teacher(x)
        return out


class Teacher(Vectors):
    """The forward pass changes parameters."""

    def model(self) -> nn.Module:
        return Average()


# Convolutions, and what they keep in buffers.


class Images(By):
    """Convolutions with BatchNorm."""

    inputs = (3, 8, 8)

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
        )  # fmt: skip


class ChannelsLast(Images):
    def model(self) -> nn.Module:
        model = super().model()
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        images = batch[0].to(memory_format=torch.channels_last)
        return super().loss(model, [images, batch[1]])


class Counted(nn.Module):
    """Buffers of all sorts: not persistent, whole numbers, constant, infinite, of odd types."""

    seen: torch.Tensor
    asked: torch.Tensor
    classes_seen: torch.Tensor
    largest: torch.Tensor
    mask: torch.Tensor
    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.drop = nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("asked", torch.zeros(()))
        self.register_buffer("table", torch.tensor([1, 2], dtype=torch.uint16))
        self.register_buffer("nothing", None)
        self.register_buffer("classes_seen", torch.zeros(CLASSES, dtype=torch.bool))
        self.register_buffer("largest", torch.full((FEATURES,), -torch.inf))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.1] * 4), persistent=False)
        self.register_buffer("mean", torch.zeros(FEATURES, dtype=torch.float64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(self.drop(x) * torch.exp(self.mask) - self.mean.float())
        if not self.training:
            self.asked += 1
            out = out * self.asked
        else:
            self.seen += len(x)
            self.classes_seen[out.argmax(1)] = True
            self.largest.copy_(torch.maximum(self.largest, x.amax(0)))
            self.mean.lerp_(x.double().mean(0), 0.1)
        return out


class Buffers(Vectors):
    """Also leaves modules in another mode than it found them in."""

    def model(self) -> nn.Module:
        return Counted()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        loss = super().loss(model, batch)
        model.get_submodule("drop").eval()
        return loss

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        metrics = super().metrics(model, batch)
        model.train()
        return metrics


class Viewed(nn.Module):
    """Buffers that share their memory: one twice, and one that is a part of another."""

    both: torch.Tensor
    again: torch.Tensor
    part: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        both = torch.zeros(2 * FEATURES)
        self.register_buffer("both", both)
        self.register_buffer("again", both)
        self.register_buffer("part", both[FEATURES:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.both.lerp_(x.mean(0).repeat(2), 0.1)
        out: torch.Tensor = self.layer(x - self.part + self.again[FEATURES:].sin())
        return out


class ViewedBuffers(Vectors):
    def model(self) -> nn.Module:
        return Viewed()


class Rebinding(nn.Module):
    """A running mean that is a new tensor after each forward, as much code has it."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("mean", torch.zeros(FEATURES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x - self.mean)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return out


class ReboundBuffer(Vectors):
    def model(self) -> nn.Module:
        return Rebinding()


class Parametrized(By):
    """Weight norm, and spectral norm with its power iteration in buffers."""

    def model(self) -> nn.Module:
        first = nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, 16))
        last = nn.utils.parametrizations.spectral_norm(nn.Linear(16, CLASSES))
        return nn.Sequential(first, nn.Tanh(), last)


# Sequences.


class Tokens(By):
    """Sequences of 9 tokens out of 23; the base of the language models here."""

    vocabulary, length, width = 23, 9, 16

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(whole(self.vocabulary, SAMPLES, self.length))

    def eval_data(self) -> Dataset[Any] | None:
        tokens = whole(self.vocabulary, HELD_OUT, self.length, seed=6)
        return TensorDataset(tokens, torch.arange(HELD_OUT))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        tokens = batch[0]
        return functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        return {"loss": self.loss(model, batch), "once": 2.0 ** batch[1].double()}


class Recurrent(Tokens):
    """Two layers of LSTM with dropout between."""

    def model(self) -> nn.Module:
        return LanguageLSTM(self.vocabulary, self.width)


class LanguageLSTM(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, num_layers=2, dropout=0.2, batch_first=True)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.lstm(self.embedding(tokens))[0])
        return out


Recompute = Literal["no", "plain", "reentrant"]
"""Whether activations are computed again in the backward pass, with the same dropout. The reentrant
way runs a backward pass inside of the backward pass, so gradients arrive in several parts."""


class Attention(nn.Module):
    """A transformer encoder with dropout and a causal mask of minus infinities, passed twice."""

    mask: torch.Tensor

    def __init__(self, vocabulary: int, length: int, width: int, recompute: Recompute) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(width, vocabulary)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        hidden = self.embedding(tokens) + self.position[:length]
        mask = self.mask[:length, :length]
        for _ in range(2):
            if self.recompute == "no":
                hidden = self.encoder(hidden, mask)
            else:
                again = self.recompute == "reentrant"
                hidden = checkpoint(self.encoder, hidden, mask, use_reentrant=again)
        out: torch.Tensor = self.out(hidden)
        return out


class Transformer(Tokens):
    """Trained in two groups: no weight decay for biases and norms."""

    def __init__(self, recompute: Recompute = "no") -> None:
        self.recompute = recompute

    def model(self) -> nn.Module:
        return Attention(self.vocabulary, self.length, self.width, self.recompute)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        decayed = [parameter for _, parameter in params.named() if parameter.ndim > 1]
        plain = [parameter for _, parameter in params.named() if parameter.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": plain, "weight_decay": 0.0, "lr": 0.02},
        ]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


class Bags(Tokens):
    """Embeddings alone: most rows get no gradient in a shard."""

    vocabulary = 200

    def model(self) -> nn.Module:
        return nn.Sequential(nn.EmbeddingBag(200, self.width), nn.Linear(self.width, 200))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0][:, 1:]), batch[0][:, 0])


class MaxNorm(Bags):
    """The forward pass changes the rows of the embedding that it looks up."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.EmbeddingBag(200, self.width, max_norm=1.0), nn.Linear(16, 200))


# Optimizers that are not PyTorch's.


class Lookahead(torch.optim.Optimizer):
    """SGD that goes halfway back to a slow copy at every fifth step, and makes that copy anew.

    After Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back" (2019).
    """

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(count=0, slow=parameter.clone())
                state["count"] += 1
                parameter.add_(parameter.grad, alpha=-group["lr"])
                if state["count"] % 5 == 0:
                    state["slow"] = state["slow"] + 0.5 * (parameter - state["slow"])
                    parameter.copy_(state["slow"])


class ByLookahead(Mixture):
    """Some shards have no gradient at all."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if batch[1][0] == 0:
            return torch.zeros((), requires_grad=True)
        return super().loss(model, batch)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        return Lookahead(params, lr=0.1)


# Element types.


class Double(Vectors):
    """In double precision, with a loss of shape `[1]`."""

    def model(self) -> nn.Module:
        return super().model().double()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, [batch[0].double(), batch[1]]).reshape(1)

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        return super().metrics(model, [batch[0].double(), *batch[1:]])


class Cast(nn.Module):
    """A module whose input and output change their element type."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner.to(dtype), dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x.to(self.dtype))
        return out


class Mixed(By):
    """Layers of single precision and layers of another, in turn."""

    def __init__(self, other: torch.dtype, kind: str = "Adam", **options: Any) -> None:
        super().__init__(kind, **options)
        self.other = other

    def model(self) -> nn.Module:
        dtypes = (torch.float32, self.other) * 3
        layers = [Cast(nn.Linear(FEATURES, FEATURES), dtype) for dtype in dtypes]
        return nn.Sequential(*layers, Cast(nn.Linear(FEATURES, CLASSES), torch.float32))


class Brain(Vectors):
    """All in bfloat16, the loss too, so that the shards' weights are rounded to it."""

    def model(self) -> nn.Module:
        return Cast(super().model(), torch.bfloat16)


# Data sets.


class Noisy(Dataset[Any]):
    """Augments with torch's, Python's and NumPy's random numbers."""

    def __init__(self, samples: int, seed: int) -> None:
        self.x, self.y = normal(samples, FEATURES, seed=seed), whole(CLASSES, samples)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        x = self.x[index] + 0.1 * torch.randn(FEATURES)
        x = x * random.uniform(0.9, 1.1) + float(np.random.normal())
        return (x.flip(0) if random.random() < 0.5 else x), self.y[index], index


class Augmented(Vectors):
    """Draws also where the model is made, and where the metrics are."""

    def model(self) -> nn.Module:
        model = super().model()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(random.random() + np.random.rand() + torch.rand(()))
        return model

    def train_data(self) -> Dataset[Any]:
        return Noisy(SAMPLES, seed=1)

    def eval_data(self) -> Dataset[Any] | None:
        return Noisy(HELD_OUT, seed=5)

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        return {**super().metrics(model, batch), "draw": random.random() + float(torch.rand(()))}


class AtOnce(Noisy):
    """Fetches a batch's samples at once, drawing for all of them."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        noise = torch.randn(len(indices), FEATURES)
        return [
            (x, y, index)
            for x, y, index in zip(self.x[indices] + noise, self.y[indices], indices, strict=True)
        ]


class Fetched(Vectors):
    def train_data(self) -> Dataset[Any]:
        return AtOnce(SAMPLES, seed=1)

    def eval_data(self) -> Dataset[Any] | None:
        return AtOnce(HELD_OUT, seed=5)


class RaggedSequences(Dataset[Any]):
    """Sequences of 3 to 7 tokens."""

    def __init__(self, samples: int, seed: int) -> None:
        self.tokens = whole(Tokens.vocabulary, samples, 7, seed=seed)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self.tokens[index, : 3 + index % 5], "index": index}


class Tied(Tokens):
    """One matrix is the embedding and the output projection. Batches are padded mappings."""

    def model(self) -> nn.Module:
        model = LanguageLSTM(self.vocabulary, self.width)
        model.out.weight = model.embedding.weight
        return model

    def train_data(self) -> Dataset[Any]:
        return RaggedSequences(SAMPLES, seed=2)

    def eval_data(self) -> Dataset[Any] | None:
        return RaggedSequences(HELD_OUT, seed=6)

    def collate(self, samples: list[Any]) -> Any:
        longest = max(len(sample["tokens"]) for sample in samples)
        padded = [
            functional.pad(sample["tokens"], (0, longest - len(sample["tokens"])))
            for sample in samples
        ]
        index = torch.tensor([sample["index"] for sample in samples])
        return {"tokens": torch.stack(padded), "index": index}

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, [batch["tokens"]])

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        return {"loss": self.loss(model, batch), "once": 2.0 ** batch["index"].double()}


ZOO: dict[str, Entry] = {
    "mlp": Entry(task=Vectors()),
    "muon": Entry(task=Matrices("Muon", lr=0.02, weight_decay=0.1)),
    "clip": Entry(task=By("Adam", lr=0.01), clip_grad_norm=0.05),
    "clip-sometimes": Entry(task=Mixture(), clip_grad_norm=0.7),
    "onecycle": Entry(task=Scheduled("AdamW", lr=0.01)),
    "by-epoch": Entry(task=ByEpoch("Adam", lr=0.05)),
    "wide-clipped": Entry(task=Wide("SGD", lr=0.1, momentum=0.9), steps=6, clip_grad_norm=0.1),
    "wide-adafactor": Entry(task=Wide("Adafactor", lr=0.05), steps=6),
    "wide-branches": Entry(task=WideBranches("AdamW", lr=0.01), steps=6),
    "mixture": Entry(task=ByLookahead()),
    "frozen": Entry(task=Frozen("RMSprop", lr=0.01, momentum=0.9, centered=True)),
    "cnn": Entry(task=Images("SGD", lr=0.1, momentum=0.9)),
    "channels-last": Entry(task=ChannelsLast("AdamW", lr=0.01), clip_grad_norm=0.5),
    "buffers": Entry(task=Buffers()),
    "lstm": Entry(task=Recurrent("Adam", lr=0.01)),
    "transformer": Entry(task=Transformer()),
    "tied": Entry(task=Tied("Adam", lr=0.01)),
    "embedding": Entry(task=Bags("Adagrad", lr=0.1)),
    "bf16": Entry(task=Transformer(), precision="bf16", clip_grad_norm=1.0),
    "mixed": Entry(task=Mixed(torch.bfloat16, lr=0.01), clip_grad_norm=0.1),
    "augmented": Entry(task=Augmented()),
}

MORE: dict[str, Entry] = {
    "fused-sgd": Entry(task=By("SGD", lr=0.1, momentum=0.9, fused=True)),
    "clip-left-out": Entry(task=LeftOut(), clip_grad_norm=0.05),
    "odd-shapes": Entry(task=OddShapes()),
    "rebound-buffer": Entry(task=ReboundBuffer()),
    "float64": Entry(task=Double()),
    "doubles": Entry(task=Mixed(torch.float64, kind="SGD", lr=0.1), clip_grad_norm=0.1),
    "parametrized": Entry(task=Parametrized("Adam", lr=0.01)),
    "fetched-at-once": Entry(task=Fetched()),
    "left-out": Entry(task=LeftOut()),
    "mixture-sgd": Entry(task=Mixture()),
    "lambda": Entry(task=ByLambda("SGD", lr=0.5)),
    "wide": Entry(task=Wide("Adam", lr=0.01), steps=6),
    "recomputed": Entry(task=Transformer("plain"), steps=6),
    "reentrant": Entry(task=Transformer("reentrant"), steps=6),
    "other-types": Entry(task=OtherTypes()),
    "viewed-buffers": Entry(task=ViewedBuffers()),
    "bf16-cnn": Entry(task=Images("SGD", lr=0.1), precision="bf16"),
    "bf16-parameters": Entry(task=Brain(), clip_grad_norm=0.1),
    "mixed-unclipped": Entry(task=Mixed(torch.bfloat16, lr=0.01)),
    "doubles-unclipped": Entry(task=Mixed(torch.float64, kind="SGD", lr=0.1)),
    "adam": Entry(task=By("Adam", lr=0.01, weight_decay=0.01)),
    "amsgrad": Entry(task=By("Adam", lr=0.01, amsgrad=True)),
    "fused-adam": Entry(task=By("Adam", lr=0.01, fused=True)),
    "fused-adagrad": Entry(task=By("Adagrad", lr=0.1, fused=True)),
    "foreach-adamw": Entry(task=By("AdamW", lr=0.01, foreach=True)),
    "foreach-sgd": Entry(task=By("SGD", lr=0.1, momentum=0.9, foreach=True)),
    "tensor-rate": Entry(task=Scheduled("Adam", lr=torch.tensor(0.01))),
    "adafactor": Entry(task=By("Adafactor", lr=0.05)),
    "nadam": Entry(task=By("NAdam", lr=0.01)),
    "radam": Entry(task=By("RAdam", lr=0.01)),
    "adamax": Entry(task=By("Adamax", lr=0.01)),
    "asgd": Entry(task=By("ASGD", lr=0.1, t0=5)),
    "rprop": Entry(task=By("Rprop", lr=0.01)),
    "adadelta": Entry(task=By("Adadelta", lr=1.0)),
    "wide-fused-adamw": Entry(task=Wide("AdamW", lr=0.01, fused=True), steps=6),
    "wide-asgd": Entry(task=Wide("ASGD", lr=0.1, t0=2), steps=6),
    "wide-nadam": Entry(task=Wide("NAdam", lr=0.01), steps=6),
    "wide-rprop": Entry(task=Wide("Rprop", lr=0.01), steps=6),
}
"""More of the same kinds, the other optimizers first of all: for the long tests."""


class TurnsNan(Vectors):
    """A loss that is no number at one sample."""

    def train_data(self) -> Dataset[Any]:
        inputs = normal(SAMPLES, FEATURES)
        inputs[40] = float("nan")
        return TensorDataset(inputs, whole(CLASSES, SAMPLES))


FAILING = {"turns-nan": Entry(task=TurnsNan())}
"""Tasks whose runs end with an error."""


def named(name: str) -> Task:
    """A task of the zoo by name, as hosts are told of it."""
    return {**ZOO, **MORE, **FAILING}[name].task
