"""Columns of the data that a transformers model takes: its Trainer's rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lockstep.adapters.common import base_of, need
from lockstep.errors import TaskError

if TYPE_CHECKING:
    from torch import nn

LABELS = frozenset({"label", "label_ids", "labels"})
"""Columns that collators make labels of."""


def of_transformers(collator: Callable[[list[Any]], Any]) -> bool:
    """Whether it is a collator of transformers, not one of the user's."""
    kind = collator if inspect.isfunction(collator) else type(collator)
    return kind.__module__.partition(".")[0] == "transformers"


def columns_of(model: nn.Module) -> frozenset[str] | None:
    """The columns that a model takes; None: it may take any."""
    transformers = need("transformers", "transformers")
    base = base_of(model)
    parameters = inspect.signature(base.forward).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if len(named) < len(parameters) and not isinstance(base, transformers.PreTrainedModel):
        return None  # what transformers' own models have there are options of attention
    return frozenset(named) | LABELS


def taken(sample: Mapping[str, Any], columns: frozenset[str]) -> dict[str, Any]:
    """Of a sample what the model takes.

    Raises:
        TaskError: that is nothing but labels, or these are texts.
    """
    found = {name: value for name, value in sample.items() if name in columns}
    for name in found.keys() & LABELS:
        if isinstance(found[name], str):
            raise TaskError(
                f"the column {name} has texts",
                expected="whole numbers for classes, decimals for values",
                found=repr(found[name])[:200],
                fix=f"number the classes: data.class_encode_column({name!r})",
            )
    if found.keys() <= LABELS:
        raise TaskError(
            "no column of the data is an input of the model",
            expected=f"one of {', '.join(sorted(columns - LABELS))}",
            found=", ".join(sample) or "no columns",
            fix="make them first: texts by data.map(lambda rows: tokenizer(rows['text']), "
            "batched=True), images by with_transform; or give collate= a function of your own",
        )
    return found
