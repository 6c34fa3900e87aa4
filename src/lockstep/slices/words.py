"""Words: cuts as transformers says them in `base_model_tp_plan`.

A mapping of patterns to words. A pattern is a module's name, `*` standing for one part of it:
`layers.*.self_attn.q_proj`. `colwise` is a cut by columns, `rowwise` one by rows; of an embedding,
`colwise` is one by width. `heads`, of an attention, is a word of our own.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lockstep.errors import JobError
from lockstep.system.spelling import meant


@dataclass(frozen=True, kw_only=True)
class Words:
    """Words by module name."""

    by_module: Mapping[str, str]
    only: bool
    """Whether nothing else is cut: they are the job's own."""


def words_of(model: nn.Module, asked: Mapping[str, str] | None) -> Words:
    """The words for a model's modules: those that the job gives, else those of its configuration.

    Raises:
        JobError: a pattern of the job's names no module.
    """
    names = [name for name, _ in model.named_modules() if name]
    if asked is not None:
        found = {}
        for pattern, word in asked.items():
            matching = _matching(pattern, names)
            if not matching:
                raise _no_module(pattern, names)
            found.update(dict.fromkeys(matching, word))
        return Words(by_module=found, only=True)
    found = {}
    for base, plan in _configured(model):
        below = [name for name in names if name.startswith(base)]
        for pattern, word in plan.items():
            found.update(dict.fromkeys(_matching(base + pattern, below), word))
    return Words(by_module=found, only=False)


def _configured(model: nn.Module) -> Iterable[tuple[str, Mapping[str, str]]]:
    """The plans of the transformers models in a model, each with what its names begin with."""
    seen: list[str] = []
    for name, module in model.named_modules():
        plan = getattr(getattr(module, "config", None), "base_model_tp_plan", None)
        inside = any(not each or name == each or name.startswith(f"{each}.") for each in seen)
        if not isinstance(plan, dict) or not plan or inside:
            continue
        seen.append(name)
        prefix = getattr(module, "base_model_prefix", "")
        base = getattr(module, prefix, None) if prefix else None
        parts = [name, prefix] if isinstance(base, nn.Module) else [name]
        yield "".join(f"{part}." for part in parts if part), plan


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    wanted = pattern.split(".")
    return [
        name
        for name in names
        if len(parts := name.split(".")) == len(wanted)
        and all(map(fnmatch.fnmatchcase, parts, wanted))
    ]


def _no_module(pattern: str, names: list[str]) -> JobError:
    near = meant(pattern, names)
    return JobError(
        f"slice_plan names no module: {pattern}",
        expected="names of the model's modules, `*` for any one part",
        found=f"no module of that name; there is {near}" if near else "no module of that name",
        fix=f"write {near}" if near else "lockstep plan --slices, without slice_plan, lists them",
    )
