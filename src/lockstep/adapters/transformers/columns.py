"""Columns: those of the data that a transformers model takes, as its Trainer selects them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lockstep.adapters.common import base_of, need
from lockstep.errors import TaskError

if TYPE_CHECKING:
    from torch import nn

LABELS = frozenset({"label", "label_ids", "labels"})
"""Columns that collators turn into labels."""


def of_transformers(collator: Callable[[list[Any]], Any]) -> bool:
    """Whether a collator is one of transformers, not the user's."""
    kind = collator if inspect.isfunction(collator) else type(collator)
    return kind.__module__.partition(".")[0] == "transformers"


def columns_of(model: nn.Module) -> frozenset[str] | None:
    """The columns that a model takes; None: any."""
    transformers = need("transformers", "transformers")
    base = base_of(model)
    parameters = inspect.signature(base.forward).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if len(named) < len(parameters) and not isinstance(base, transformers.PreTrainedModel):
        return None  # in transformers' own models, keyword arguments are options of attention
    return frozenset(named) | LABELS


def taken(sample: Mapping[str, Any], columns: frozenset[str]) -> dict[str, Any]:
    """The columns of a sample that the model takes.

    Raises:
        TaskError: they are only labels, or labels that are texts.
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


def lengths_of(data: Any, column: str) -> list[int]:
    """The lengths of samples: a column of theirs, else how many `input_ids` each has.

    Raises:
        TaskError: they have neither.
    """
    if column in getattr(data, "column_names", ()):
        return list(data[column])
    lengths = []
    for index in range(len(data)):
        sample = data[index]
        if column not in sample and "input_ids" not in sample:
            raise TaskError(
                "samples are to be grouped by length, and do not say it",
                expected=f"a column {column}, or input_ids",
                found=", ".join(map(str, sample)) or "no columns",
                fix="name the column: length_column_name=; or leave out group_by_length",
            )
        lengths.append(int(sample[column]) if column in sample else len(sample["input_ids"]))
    return lengths
