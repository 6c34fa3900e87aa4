"""Hugging Face datasets: checks of arguments that are data sets of the package `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lockstep.errors import JobError

TABLES = ("arrow", "polars")
"""Formats of a `datasets.Dataset` that give tables, not samples."""


def check_table(name: str, data: Any) -> None:
    """Check that an argument is one map-style data set of samples.

    Args:
        name: the argument's name, for messages.
        data: its value.

    Raises:
        JobError: it is several data sets, has no length, or gives tables.
    """
    if isinstance(data, str):
        raise JobError(
            f"{name} is a name, not a data set",
            expected="the data set itself, or a function that makes it",
            found=repr(data),
            fix=f"{name}=datasets.load_from_disk({data!r}), for instance",
        )
    kind = _kind(data)
    if kind in ("DatasetDict", "IterableDatasetDict"):
        splits = ", ".join(map(repr, data))
        raise JobError(
            f"{name} is several data sets",
            expected="one of them",
            found=f"a {kind} of {splits}",
            fix=f"{name}=data[{next(iter(data), 'train')!r}]",
        )
    if kind == "IterableDataset":
        raise JobError(
            f"{name} is a stream: it has no length, and no sample has a number",
            expected="a datasets.Dataset, or anything with __len__ and __getitem__",
            found="a datasets.IterableDataset",
            fix="load_dataset without streaming=True, or datasets.Dataset.from_generator, which "
            "writes a stream to disk once",
        )
    form = getattr(data, "format", None) if kind == "Dataset" else None
    if isinstance(form, Mapping) and form.get("type") in TABLES:
        raise JobError(
            f"{name} gives tables, not samples",
            expected='a format of samples: none, "torch" or "numpy"',
            found=f'with_format("{form["type"]}")',
            fix=f"{name}=data.with_format(None)",
        )


def _kind(data: Any) -> str:
    """The name of the class, if it is one of `datasets`; otherwise ""."""
    for kind in type(data).__mro__:
        if kind.__module__.partition(".")[0] == "datasets":
            return kind.__name__
    return ""
