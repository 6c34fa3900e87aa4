"""Several optimizers as one, for models that need it: sparse gradients beside dense ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


class Together(torch.optim.Optimizer):
    """Optimizers over different parameters, stepped one after the other.

    `SparseAdam` takes sparse gradients alone and `Adam` dense ones alone, and `Task.optimizer`
    returns one optimizer:

        tables = [p for name, p in params.named() if name.startswith("tables.")]
        others = [p for name, p in params.named() if not name.startswith("tables.")]
        return lockstep.Together(torch.optim.SparseAdam(tables), torch.optim.Adam(others))

    Their parameter groups become its groups, in their order, so a schedule changes all of them.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__([{"params": list(group["params"])} for group in groups], {})
        self.param_groups = groups
        state: defaultdict[Any, Any] = defaultdict(dict)
        for optimizer in optimizers:
            state.update(optimizer.state)
        self.state = state

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: its optimizers share its parameter groups, as here."""
        return {**super().__getstate__(), "optimizers": self.optimizers}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each; a closure is called once, before all."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            if any(group["params"] for group in optimizer.param_groups):
                optimizer.state = self.state
                bare_step(optimizer)(optimizer)
        return loss


def bare_step(optimizer: torch.optim.Optimizer) -> Callable[[torch.optim.Optimizer], Any]:
    """The optimizer's own `step`, without the wrapper that PyTorch puts around it for profiling
    and for hooks, where there are no hooks: it costs a quarter of a small model's update."""
    step = type(optimizer).step
    inner = getattr(step, "__wrapped__", None)
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    if inner is None or not getattr(step, "hooked", False) or any(hooks):
        return lambda opt: opt.step()
    return cast("Callable[[torch.optim.Optimizer], Any]", inner)
