"""Buffer rules: how what the shards of a step left in a buffer becomes one value.

A buffer may hold anything: a mean, a count, a queue. So the rule is declared, by the task or by the
class of the module that has the buffer, or it is known, for torch's own modules. A buffer without
a rule has to stay as it is where a batch is divided; the step in which it changes is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from lockstep.errors import TaskError
from lockstep.job.task import Task
from lockstep.system.dtypes import CONSTANT

BufferRule = Literal["mean", "sum", "max", "min", "last"]
"""`mean`, weighted by the shards' samples · `sum` of the shards' changes, added to the value before
· `max`, `min`, of each element · `last`: what the last shard left."""
RULES: tuple[str, ...] = get_args(BufferRule)
CHOICE = "mean, sum (of the shards' changes), max, min or last (what the last shard left)"

_AVERAGES: Mapping[str, BufferRule] = {
    "running_mean": "mean", "running_var": "mean", "num_batches_tracked": "max",
}  # fmt: skip
_SAME_IN_ALL: Mapping[str, BufferRule] = {"_u": "last", "_v": "last"}
"""The power iteration depends on the weight alone."""
_KNOWN: dict[type[nn.Module], Mapping[str, BufferRule]] = {
    **dict.fromkeys(
        (
            nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
            nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
        ),
        _AVERAGES,
    ),
    _SpectralNorm: _SAME_IN_ALL,
}  # fmt: skip
_MOVING: Mapping[str, BufferRule] = {"min_val": "mean", "max_val": "mean"}
_EXTREMES: Mapping[str, BufferRule] = {"min_val": "min", "max_val": "max"}
_DERIVED: Mapping[str, BufferRule] = {"scale": "last", "zero_point": "last"}
"""Computed anew from the observer's range at each forward pass, and only together of use."""
_KNOWN_BY_NAME: Mapping[str, Mapping[str, BufferRule]] = {
    "torch.ao.quantization.observer.MinMaxObserver": _EXTREMES,
    "torch.ao.quantization.observer.MovingAverageMinMaxObserver": _MOVING,
    "torch.ao.quantization.fake_quantize.FakeQuantize": _DERIVED,
    "torch.ao.quantization.fake_quantize.FusedMovingAvgObsFakeQuantize": _DERIVED,
    "timm.layers.norm_act.BatchNormAct2d": _AVERAGES,
    "timm.layers.norm_act.SyncBatchNormAct": _AVERAGES,
}
"""Classes that are not imported for this: their names are compared."""


def rules_of(task: Task, model: nn.Module) -> list[BufferRule | None]:
    """The rule of each of the model's buffers, or None, in the order of `named_buffers`.

    The task's rules come first, then those of the modules around the buffer, from the inside out,
    then what is known of torch's classes.

    Raises:
        TaskError: what is declared is no rule.
    """
    by_task = _checked(task.buffer_rules(), f"{type(task).__name__}.buffer_rules()")
    found: list[BufferRule | None] = []
    for name, _ in model.named_buffers():
        rule = _match(by_task, name)
        parts = name.split(".")
        for depth in reversed(range(len(parts))):
            if rule is None:
                module = model.get_submodule(".".join(parts[:depth]))
                where = f"{type(module).__name__}.buffer_rules"
                declared = _checked(getattr(module, "buffer_rules", {}), where)
                rule = _match(declared, ".".join(parts[depth:]))
        if rule is None:
            owner = model.get_submodule(".".join(parts[:-1]))
            rule = _known(owner).get(parts[-1])
        found.append(rule)
    return found


def _match(rules: Mapping[str, BufferRule], name: str) -> BufferRule | None:
    return next((rule for pattern, rule in rules.items() if fnmatchcase(name, pattern)), None)


def _checked(declared: object, where: str) -> Mapping[str, BufferRule]:
    if not isinstance(declared, Mapping) or any(
        not isinstance(pattern, str) or rule not in RULES for pattern, rule in declared.items()
    ):
        raise TaskError(
            f"{where} does not give rules for buffers",
            expected=f"a mapping of names, or patterns such as '*.queue', to {CHOICE}",
            found=repr(declared),
            fix='for instance {"seen": "sum"}',
        )
    return declared


def _known(module: nn.Module) -> Mapping[str, BufferRule]:
    """What is known of a class: of torch's own, and of those that have its very `forward`."""
    rules = dict(_KNOWN_BY_NAME.get(f"{type(module).__module__}.{type(module).__qualname__}", {}))
    for known, its_rules in _KNOWN.items():
        if isinstance(module, known) and type(module).forward is known.forward:
            rules |= its_rules
    for hook in module._forward_pre_hooks.values():
        if type(hook) is SpectralNorm:
            rules |= {f"{hook.name}{leaf}": rule for leaf, rule in _SAME_IN_ALL.items()}
    return rules


def _fits(rule: BufferRule | None, dtype: torch.dtype) -> bool:
    """Whether a rule can be computed for a type."""
    if rule is None or rule == "last":
        return rule == "last"
    if dtype in CONSTANT:
        return False
    if rule == "mean":
        return dtype.is_floating_point or dtype.is_complex
    return dtype is not torch.bool if rule == "sum" else not dtype.is_complex


@dataclass(frozen=True, kw_only=True)
class _Watched:
    index: int
    name: str
    rule: BufferRule | None
    before: torch.Tensor


class BufferWatch:
    """The buffers that may not change, since no rule makes one value of what shards leave."""

    def __init__(
        self,
        model: nn.Module,
        committed: Sequence[torch.Tensor],
        rules: Sequence[BufferRule | None],
        shards: int,
    ) -> None:
        self._model, self._shards = model, shards
        self._watched = [
            _Watched(index=index, name=name, rule=rule, before=before)
            for index, ((name, _), before, rule) in enumerate(
                zip(model.named_buffers(), committed, rules, strict=True)
            )
            if shards > 1 and not _fits(rule, before.dtype)
        ]

    def check(self, left: Sequence[torch.Tensor], step: int) -> None:
        """Compare what a shard left, in the order of the buffers, with the committed bytes.

        Raises:
            TaskError: a buffer has changed.
        """
        changed = [
            watched
            for watched in self._watched
            if not same_bytes(left[watched.index], watched.before)
        ]
        if changed:
            raise self._changed(changed, step)

    def _changed(self, changed: Sequence[_Watched], step: int) -> TaskError:
        watched = changed[0]
        path, _, leaf = watched.name.rpartition(".")
        owner, dtype = type(self._model.get_submodule(path)).__name__, watched.before.dtype
        what = f"{tuple(watched.before.shape)} {dtype} of {owner}; it changed at step {step}"
        if watched.rule is not None:
            raise TaskError(
                f"the rule of buffer {watched.name} is {watched.rule}, which {dtype} has not",
                expected=f"a rule that can be computed with it, of {CHOICE}",
                found=what,
                fix="choose another rule, or use int64 or float32 for what changes",
            )
        return TaskError(
            f"the forward pass changed {_listed(changed)}, and nothing says how the values of "
            f"{self._shards} shards become one",
            expected=f"a rule for the buffer: {CHOICE}",
            found=what,
            fix=f'declare it in the class of the module, {owner}: buffer_rules = {{"{leaf}": '
            f'"sum"}}; or in the task: def buffer_rules(self): return {{"{watched.name}": "sum"}}; '
            "where no rule is right (a queue), set shards to 1, which does not divide the batch",
        )


def _listed(changed: Sequence[_Watched]) -> str:
    names = [watched.name for watched in changed]
    more = f" and {len(names) - 6} others" if len(names) > 6 else ""
    return f"buffer{'s' * (len(names) > 1)} {', '.join(names[:6])}{more}"


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
"""By the bytes of an element: whole numbers that an element is one or two of."""


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one shape and type are the same bytes."""
    word = _WORDS[left.dtype.itemsize]
    one, other = (value.flatten().view(word).cpu().numpy() for value in (left, right))
    return bool((one == other).all())
