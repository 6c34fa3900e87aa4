"""Parameters that are not there for every shard, are not the optimizer's, or are of other types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lockstep.job.task import Parameters
from tests.zoo.vectors import CLASSES, FEATURES, By, Vectors, Wide


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


class WideBranches(Wide):
    """A cut weight that many shards have no gradient for, and some steps none at all."""

    def model(self) -> nn.Module:
        return Branches(512, 512)


# Optimizers that are not PyTorch's.


class Lookahead(torch.optim.Optimizer):
    """SGD that goes halfway back to a slow copy at every fifth step, and makes that copy anew.

    After Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back" (2019).
    """

    lockstep_update = "elementwise"

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
