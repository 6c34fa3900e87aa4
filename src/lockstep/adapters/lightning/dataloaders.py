"""Dataloaders: the data set and the collate_fn of the one DataLoader; its batches are not used."""

from __future__ import annotations

from typing import Any

from lockstep.errors import TaskError


def one_loader(loader: Any, name: str) -> Any:
    """The only loader, in the data's order or shuffled.

    Raises:
        TaskError: there are several, or its sampler is another one.
    """
    from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

    if isinstance(loader, list | tuple) and len(loader) == 1:
        loader = loader[0]
    if not isinstance(loader, DataLoader):
        raise TaskError(
            f"{name} did not return one DataLoader",
            expected="a torch.utils.data.DataLoader",
            found=repr(type(loader)),
            fix="join several data sets by torch.utils.data.ConcatDataset",
        )
    sampler = getattr(loader, "sampler", None)
    usual = type(sampler) in (RandomSampler, SequentialSampler)
    own_batches = type(loader.batch_sampler).__name__ not in ("BatchSampler", "NoneType")
    if not usual or own_batches or getattr(sampler, "replacement", False):
        raise TaskError(
            f"{name} has a sampler of its own",
            expected="every sample once per data epoch: shuffle=True or shuffle=False",
            found=type(loader.batch_sampler if own_batches else sampler).__name__,
            fix="leave out sampler and batch_sampler; the order follows from the job's seed",
        )
    return loader


def alike(one: Any, other: Any) -> bool:
    """Whether two collate functions are the same, or objects of the same class and content."""
    if one is other or one == other:
        return True
    return (
        type(one) is type(other)
        and bool(getattr(one, "__dict__", None))
        and (vars(one) == vars(other))
    )
