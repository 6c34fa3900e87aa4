"""The data sets that a task builds, and what they have to be."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset

from lockstep.errors import DataError
from lockstep.job.task import Task


def build_sets(task: Task, *, alone: bool) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """The task's training set and its held-out set.

    `alone`: no other host builds them, so that nothing else may come of it.

    Raises:
        DataError: building them has changed the task, which is not so on other hosts.
    """
    before = dict(vars(task))
    sets = task.train_data(), task.eval_data()
    if alone:
        _check_unchanged(task, before)
    return sets


def _check_unchanged(task: Task, before: Mapping[str, object]) -> None:
    kind = type(task)
    changed = [
        f"self.{name}"
        for name, value in vars(task).items()
        if not (name in before and before[name] is value)
        and not isinstance(getattr(kind, name, None), functools.cached_property)
    ]
    if changed:
        raise DataError(
            f"the data of {kind.__name__} cannot be sent to other hosts: building it sets "
            "attributes of the task, which they would lack",
            expected="train_data() and eval_data() that return data and change nothing",
            found=", ".join(changed),
            fix="set them where every host does, in __init__ or model(), or set data to build",
        )


def length_of(dataset: Any, name: str) -> int:
    """How many samples a set has that `Task.name` has returned.

    Raises:
        DataError: it is empty, or no map-style data set.
    """
    _check_samples(dataset, name)
    try:
        size = len(dataset)
    except TypeError:
        size = None
    indexed = hasattr(type(dataset), "__getitem__")
    if isinstance(dataset, dict):
        indexed = 0 in dataset
    if size is None or not indexed or isinstance(dataset, IterableDataset):
        raise DataError(
            f"Task.{name}() did not return a map-style data set",
            expected="__len__ and __getitem__",
            found=repr(type(dataset)),
            fix="return the data set itself: batches are made from it"
            if isinstance(dataset, DataLoader)
            else "wrap it in a data set that knows its length and is indexed from 0",
        )
    if size == 0:
        raise DataError(
            f"Task.{name}() returned an empty data set",
            expected="at least one sample",
            found="none",
            fix="look at what it reads, and where from",
        )
    return size


def _check_samples(dataset: Any, name: str) -> None:
    """Check that it is not what merely looks like a sequence of samples: a path, or `(X, y)`."""
    if isinstance(dataset, str | bytes):
        found, fix = f"the text {dataset!r:.60}", "read the file, and return its samples"
    elif type(dataset).__name__ in ("DataFrame", "Series") and hasattr(dataset, "to_numpy"):
        found = f"a {type(dataset).__name__}, whose items are columns or rows by label"
        fix = "make it TensorDataset(torch.as_tensor(frame[[...]].to_numpy()), ...)"
    elif isinstance(dataset, tuple | list) and _are_columns(dataset):
        shapes = ", ".join(str(tuple(each.shape)) for each in dataset)
        kind = type(dataset).__name__
        found = f"a {kind} of {len(dataset)} arrays, of the shapes {shapes}"
        fix = "make it TensorDataset(torch.as_tensor(X), torch.as_tensor(y))"
    else:
        return
    raise DataError(
        f"Task.{name}() did not return a map-style data set",
        expected="a data set, whose item i is sample i",
        found=found,
        fix=fix,
    )


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and len(value.shape) > 0


def _are_columns(arrays: Sequence[Any]) -> bool:
    """Whether these are a few arrays of one length that are otherwise unlike, as samples are
    not."""
    if len(arrays) > MOST_COLUMNS or not all(map(_is_array, arrays)):
        return False
    lengths = {each.shape[0] for each in arrays}
    kinds = {(tuple(each.shape), str(getattr(each, "dtype", ""))) for each in arrays}
    return len(lengths) == 1 and len(kinds) > 1


MOST_COLUMNS = 16
"""More in a tuple or list are samples."""
