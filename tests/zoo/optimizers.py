"""Optimizers that are not PyTorch's own, as people write them: most look at all tensors."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lockstep.job.task import Parameters
from tests.zoo.vectors import CLASSES, FEATURES, Vectors, Wide


class Own(torch.optim.Optimizer):
    """Calls `update(parameter, gradient, state, options)` for each tensor that has a gradient."""

    def __init__(self, params: Any, lr: float = 0.01, **options: Any) -> None:
        super().__init__(params, {"lr": lr, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group)

    def update(
        self, p: torch.Tensor, grad: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> None:
        raise NotImplementedError

    def grads(self) -> list[torch.Tensor]:
        given = [p for group in self.param_groups for p in group["params"]]
        return [p.grad for p in given if p.grad is not None]


def adam(state: dict[str, Any], grad: torch.Tensor) -> torch.Tensor:
    """Adam's direction; the state counts in a Python number."""
    if "t" not in state:
        state.update(t=0, m=torch.zeros_like(grad), v=torch.zeros_like(grad))
    state["t"] += 1
    state["m"].lerp_(grad, 0.1)
    state["v"].lerp_(grad**2, 0.01)
    m, v = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.99 ** state["t"])
    direction: torch.Tensor = m / (v.sqrt() + 1e-8)
    return direction


class Clips(torch.optim.SGD):
    """Limits the norm over all tensors, at a value that some steps reach and others do not."""

    most = 0.35

    def step(self, closure: Any = None) -> Any:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grad_norm_(params, self.most)
        return super().step(closure)


class SkipsNonFinite(torch.optim.SGD):
    """Leaves an update out if any gradient is not finite, as GradScaler does."""

    def step(self, closure: Any = None) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        if all(bool(torch.isfinite(grad).all()) for grad in grads if grad is not None):
            return super().step(closure)
        return None


class Distance(Own):
    """D-adaptation in short: the rate grows with the distance over all tensors, which is an option
    of the group; a tensor and a count are attributes."""

    def __init__(self, params: Any, lr: float = 20.0) -> None:
        super().__init__(params, lr=lr, d=1e-3)
        self.calls = 0
        self.farthest = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.calls += 1
        for group in self.param_groups:
            far = 0.0
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["x0"] = p.clone()
                    far += float((p.grad * (self.state[p]["x0"] - p)).sum())
            group["d"] = max(group["d"], far)
            self.farthest = torch.maximum(self.farthest, torch.tensor(far))
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] * group["d"] * (1 + 1 / self.calls))


class Lamb(Own):
    """LAMB whose trust ratio begins after a warm-up."""

    def __init__(self, params: Any, warm: int = 3) -> None:
        super().__init__(params, warm=warm)

    def update(self, p: Any, grad: Any, state: Any, group: Any) -> None:
        direction, ratio = adam(state, grad), 1.0
        if state["t"] > group["warm"]:
            ratio = min(max(float(p.norm() / direction.norm().clamp_min(1e-12)), 0.01), 10.0)
        p.add_(direction, alpha=-group["lr"] * ratio)


class MuonFloor(Own):
    """Orthogonalises the momentum of matrices of a certain size; Adam for the rest."""

    def __init__(self, params: Any, floor: int = 100) -> None:
        super().__init__(params, floor=floor)

    def update(self, p: Any, grad: Any, state: Any, group: Any) -> None:
        if p.ndim == 2 and min(p.shape) >= group["floor"]:
            if not state:
                state["momentum"] = torch.zeros_like(p)
            state["momentum"].lerp_(grad, 0.05)
            x = grad.lerp(state["momentum"], 0.95)
            x = x / (x.norm() + 1e-7)
            for _ in range(3):
                a = x @ x.T
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
            p.add_(x, alpha=-group["lr"])
        else:
            p.add_(adam(state, grad), alpha=-group["lr"])


class GaLore(Own):
    """Adam in a subspace, for matrices above a rank: state of a shape of its own."""

    def __init__(self, params: Any, rank: int = 6) -> None:
        super().__init__(params, rank=rank)

    def update(self, p: Any, grad: Any, state: Any, group: Any) -> None:
        if p.ndim == 2 and min(p.shape) > group["rank"]:
            if not state:
                state["P"] = torch.linalg.svd(grad, full_matrices=False)[0][:, : group["rank"]]
            p.add_(state["P"] @ adam(state, state["P"].T @ grad), alpha=-group["lr"])
        else:
            p.add_(adam(state, grad), alpha=-group["lr"])


class Soap(Own):
    """Adam in the eigenbasis of Shampoo's statistics, which lie in lists, like in SOAP's code. The
    first step only prepares."""

    def update(self, p: Any, grad: Any, state: Any, group: Any) -> None:
        if "Q" not in state:
            state["GG"] = [torch.zeros(n, n) if n <= 64 else [] for n in p.shape]
            state["Q"] = None
            state.update(t=0, m=torch.zeros_like(grad), v=torch.zeros_like(grad))
            self.gather(grad, state)
            return
        for q in state["Q"]:
            grad = torch.tensordot(grad, q, dims=([0], [0])) if len(q) else grad.movedim(0, -1)
        step = adam(state, grad)
        for q in state["Q"]:
            step = torch.tensordot(step, q, dims=([0], [1])) if len(q) else step.movedim(0, -1)
        p.add_(step, alpha=-group["lr"])

    def gather(self, grad: torch.Tensor, state: dict[str, Any]) -> None:
        for dim, total in enumerate(state["GG"]):
            if len(total):
                others = [i for i in range(grad.ndim) if i != dim]
                total.lerp_(torch.tensordot(grad, grad, dims=(others, others)), 0.1)
        state["Q"] = [torch.linalg.eigh(t)[1] if len(t) else [] for t in state["GG"]]


class SaysPerTensor(Own):
    """Normalises each tensor's gradient, and says that it is one by one."""

    lockstep_update = "per_tensor"

    def update(self, p: Any, grad: Any, state: Any, group: Any) -> None:
        p.add_(grad / (grad.norm() + 1e-8), alpha=-group["lr"])


class SaysElementwise(Own):
    """Follows the signs, and says that every element is by itself."""

    lockstep_update = "elementwise"

    def update(self, p: Any, grad: Any, state: Any, group: Any) -> None:
        p.add_(adam(state, grad).sign(), alpha=-group["lr"])


# What cannot be kept.


class RemembersNorms(Own):
    """Clips at a quantile of the norms so far, which it collects (AutoClip)."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.norms: deque[float] = deque(maxlen=100)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.norms.append(float(torch.stack([grad.norm() for grad in self.grads()]).norm()))
        super().step()

    def update(self, p: Any, grad: Any, state: Any, group: Any) -> None:
        p.add_(grad, alpha=-group["lr"] / (1 + max(self.norms)))


class Wraps(torch.optim.Optimizer):
    """Steps another optimizer, which keeps its own state."""

    def __init__(self, params: Any) -> None:
        self.base = torch.optim.Adam(params)
        super().__init__(self.base.param_groups, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.base.step()


class DrawsLater(Own):
    """Adds noise from its third step on."""

    def update(self, p: Any, grad: Any, state: Any, group: Any) -> None:
        state["t"] = state.get("t", 0) + 1
        p.add_(grad, alpha=-group["lr"])
        if state["t"] > 2:
            p.add_(torch.randn_like(p), alpha=1e-3)


# Tasks.


class WithOwn(Vectors):
    """The MLP of `Vectors` by any optimizer."""

    def __init__(self, make: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
        self.make, self.options = make, options

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """In two groups, the later parameters first: order matters where norms are taken."""
        given = [parameter for _, parameter in params.named()]
        return self.make([{"params": given[2:]}, {"params": given[:2]}], **self.options)


class WideWithOwn(WithOwn):
    """A weight of 262,144 elements, which would be cut into four blocks."""

    inputs = (512,)

    def model(self) -> nn.Module:
        return Wide.model(self)  # type: ignore[arg-type]


class RootOfNegative(WithOwn):
    """A loss that is finite, with a gradient that is not for some samples."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        assert isinstance(model, nn.Sequential)
        first = model[0](batch[0])[:, 0]
        hit = batch[0][:, 0] > 1.9
        root = torch.where(hit, (first * 0).abs().sqrt(), torch.zeros_like(first)).mean()
        return super().loss(model, batch) + root
