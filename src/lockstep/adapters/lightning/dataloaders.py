"""Dataloaders: the data set, the collate_fn and the settings of the one DataLoader."""

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


def settings_of(loader: Any, batch_size: str) -> dict[str, Any]:
    """The job's settings that a loader of training data has."""
    from torch.utils.data import RandomSampler

    found: dict[str, Any] = {"shuffle": type(loader.sampler) is RandomSampler}
    if loader.batch_size is not None:
        found |= {batch_size: loader.batch_size, "drop_last": loader.drop_last}
    return found


def held_out_settings_of(loader: Any, name: str) -> dict[str, Any]:
    """The job's settings that a loader of held-out data has.

    Raises:
        TaskError: it leaves samples out.
    """
    if loader.drop_last:
        raise TaskError(
            f"{name} has drop_last=True",
            expected="drop_last=False: every held-out sample counts once",
            found="drop_last=True",
            fix="leave it out; a short last batch is weighted by its samples",
        )
    return {} if loader.batch_size is None else {"eval_batch_size": loader.batch_size}


def alike(one: Any, other: Any) -> bool:
    """Whether two collate functions are the same, or objects of the same class and content."""
    if one is other or one == other:
        return True
    return (
        type(one) is type(other)
        and bool(getattr(one, "__dict__", None))
        and (vars(one) == vars(other))
    )
