"""Known optimizers: which classes update tensors one by one, and which even element by element.

What is divided among owners is decided by what a class is, never by trying it: a trial does not see
what happens above a threshold, after a warm-up, or to a gradient that is not finite. A class that
is not known sees all its parameters whole, in one process (see `undivided_update`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lockstep.errors import OptimizerError
from lockstep.optim.chained import Together

Rule = Literal["elementwise", "per_tensor", "together"]
"""`elementwise`: a tensor may be cut anywhere. `per_tensor`: tensors may be updated by different
owners, each whole. `together`: one owner updates all."""

KNOWN: dict[type, Rule] = {
    torch.optim.ASGD: "elementwise",
    torch.optim.Adadelta: "elementwise",
    torch.optim.Adagrad: "elementwise",
    torch.optim.Adam: "elementwise",
    torch.optim.AdamW: "elementwise",
    torch.optim.Adamax: "elementwise",
    torch.optim.NAdam: "elementwise",
    torch.optim.RAdam: "elementwise",
    torch.optim.RMSprop: "elementwise",
    torch.optim.Rprop: "elementwise",
    torch.optim.SGD: "elementwise",
    torch.optim.SparseAdam: "elementwise",
    torch.optim.Adafactor: "per_tensor",
    torch.optim.Muon: "per_tensor",
}
"""Exact types: a subclass may do anything else."""

ATTRIBUTE = "lockstep_update"
"""The class attribute by which other classes declare their rule."""


def rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    """What may be divided of the optimizer's work.

    A declaration counts for the very class that makes it: a subclass may do anything else.

    Raises:
        OptimizerError: the class declares something else than a rule.
    """
    if _has_hooks(optimizer):
        return "together"
    kind = type(optimizer)
    if type(optimizer) is Together:
        rules = {rule_of(part) for part in optimizer.optimizers}
        if "together" in rules:
            return "together"
        return "per_tensor" if "per_tensor" in rules else "elementwise"
    if kind in KNOWN:
        return KNOWN[kind]
    declared = vars(kind).get(ATTRIBUTE, "together")
    if declared not in ("elementwise", "per_tensor", "together"):
        raise OptimizerError(
            f"{kind.__name__} declares an unknown {ATTRIBUTE}",
            expected="elementwise, per_tensor or together",
            found=repr(declared),
            fix=f"leave {ATTRIBUTE} out, which is always right: one worker updates all then",
        )
    rule: Rule = declared
    return rule


def is_known(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the rule is Lockstep's own knowledge, and not a declaration."""
    if type(optimizer) is Together:
        return all(is_known(part) for part in optimizer.optimizers)
    return type(optimizer) in KNOWN


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's class, or the one among several that is not known."""
    if type(optimizer) is Together:
        unknown = [part for part in optimizer.optimizers if rule_of(part) == "together"]
        if unknown:
            return name_of(unknown[0])
    return type(optimizer).__name__


def part_of(optimizer: torch.optim.Optimizer, group: int) -> torch.optim.Optimizer:
    """The one among several optimizers that has this parameter group."""
    if type(optimizer) is Together:
        for part in optimizer.optimizers:
            if group < len(part.param_groups):
                return part_of(part, group)
            group -= len(part.param_groups)
    return optimizer


def why_together(optimizer: torch.optim.Optimizer) -> str:
    """One sentence on an optimizer whose work is not divided."""
    return (
        f"{name_of(optimizer)} is not known to update tensors one by one: one worker updates all; "
        f'declare {ATTRIBUTE} = "per_tensor" or "elementwise" in the class to divide it'
    )


def _has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether code of others runs with each step."""
    own = vars(optimizer).get("step")  # a schedule puts a counter around it
    return bool(
        getattr(optimizer, "_optimizer_step_pre_hooks", None)
        or getattr(optimizer, "_optimizer_step_post_hooks", None)
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
        or (own is not None and not getattr(own, "_wrapped_by_lr_sched", False))
    )
