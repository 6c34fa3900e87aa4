"""Direct update: PyTorch's fused kernels, called with lists of tensors that are kept.

`step()` collects the same parameters, gradients and states anew each time, and groups them by type:
for a small model that costs as much as the arithmetic. What is called here is what `_fused_adam`
and `_fused_sgd` of `torch.optim` call, with the same values; options are read at each step, since
schedules change them. Whatever is not exactly that case goes through `step()`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lockstep.optim.known_optimizers import part_of

Tensors = list[torch.Tensor]


def _plain(step: Any) -> Any:
    """A class's `step` without what PyTorch puts around it when the first optimizer is made."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


_STEPS: Mapping[type, Any] = {
    kind: _plain(kind.step) for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
}
"""By the exact type: its `step`, as it was when this was imported."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The members of one parameter group."""

    options: dict[str, Any]
    """The group's own mapping."""
    indices: Sequence[int]
    """Which of the gradients are its members'."""
    params: Tensors
    state: Mapping[str, Tensors]
    """By the state's name."""

    def fits(self) -> bool:
        """Whether the options are such that `step` would call the fused kernel just so."""
        options = self.options
        if options["fused"] is not True or options["differentiable"]:
            return False
        if "betas" in options:
            plain = not any(isinstance(beta, torch.Tensor) for beta in options["betas"])
            return plain and bool(options["amsgrad"]) is ("max_exp_avg_sq" in self.state)
        return bool(options["momentum"] != 0) is bool(self.state)

    @property
    def kernel(self) -> str:
        """Whose fused kernel it is: `adam`, `adamw` or `sgd`."""
        if "betas" not in self.options:
            return "sgd"
        return "adamw" if self.options["decoupled_weight_decay"] else "adam"

    def update(self, grads: Sequence[torch.Tensor]) -> None:
        """Update the members by their gradients."""
        mine = [grads[index] for index in self.indices]
        if "betas" in self.options:
            self._adam(mine)
        else:
            self._sgd(mine)

    def _adam(self, grads: Tensors) -> None:
        options, state = self.options, self.state
        beta1, beta2 = options["betas"]
        kernel = torch._fused_adamw_ if options["decoupled_weight_decay"] else torch._fused_adam_
        torch._foreach_add_(state["step"], 1)
        kernel(
            self.params, grads, state["exp_avg"], state["exp_avg_sq"],
            state.get("max_exp_avg_sq", []), state["step"],
            amsgrad=options["amsgrad"], lr=options["lr"], beta1=beta1, beta2=beta2,
            weight_decay=options["weight_decay"], eps=options["eps"], maximize=options["maximize"],
            grad_scale=None, found_inf=None,
        )  # fmt: skip

    def _sgd(self, grads: Tensors) -> None:
        options = self.options
        torch._fused_sgd_(
            self.params, grads, self.state.get("momentum_buffer", []),
            weight_decay=options["weight_decay"], momentum=options["momentum"], lr=options["lr"],
            dampening=options["dampening"], nesterov=options["nesterov"],
            maximize=options["maximize"], is_first_step=False, grad_scale=None, found_inf=None,
        )  # fmt: skip


class DirectUpdate:
    """One step of the optimizer on blocks of one type, all of whose state has begun."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts

    @staticmethod
    def of(
        optimizer: torch.optim.Optimizer, members: Sequence[tuple[int, nn.Parameter]]
    ) -> DirectUpdate | None:
        """The update of these members, each with its parameter group's number, in the order in
        which `run` gets their gradients; None if it is not known to be what `step` does."""
        parts = []
        for number in sorted({group for group, _ in members}):
            part = _part(optimizer, number, members)
            if part is None or not part.fits():
                return None
            parts.append(part)
        return DirectUpdate(parts)

    def run(self, grads: Sequence[torch.Tensor | None]) -> bool:
        """Update; false, with nothing done, where a gradient is missing or an option has changed
        so that `step` would do something else."""
        there = [gradient for gradient in grads if gradient is not None]
        if len(there) < len(grads) or not all(part.fits() for part in self.parts):
            return False
        with torch.no_grad():
            for part in self.parts:
                part.update(there)
        return True


def _part(
    optimizer: torch.optim.Optimizer, number: int, members: Sequence[tuple[int, nn.Parameter]]
) -> Part | None:
    """One parameter group, if its optimizer is one of those known here, as torch has made it."""
    actual = part_of(optimizer, number)
    kind = type(actual)
    if _STEPS.get(kind) is not _plain(getattr(kind, "step", None)):
        return None
    if getattr(actual, "grad_scale", None) is not None or hasattr(actual, "found_inf"):
        return None
    indices = [index for index, (group, _) in enumerate(members) if group == number]
    params = [members[index][1] for index in indices]
    states = [optimizer.state[param] for param in params]
    names = set(states[0])
    if any(set(state) != names or not _all_tensors(state) for state in states):
        return None
    return Part(
        options=optimizer.param_groups[number],
        indices=indices,
        params=list(params),
        state={name: [state[name] for state in states] for name in names},
    )


def _all_tensors(state: Mapping[str, Any]) -> bool:
    return all(isinstance(value, torch.Tensor) for value in state.values())
