"""The recipes' data sets: one file each, with what they share in `fetching` and `packages`.

A data set's file declares where its files come from and reads them into arrays. Nothing here
imports torch.
"""

from __future__ import annotations

from pathlib import Path

from lockstep.errors import DataError
from lockstep.recipes.datasets.adult import ADULT, load_adult
from lockstep.recipes.datasets.debian_descriptions import (
    DESCRIPTIONS,
    load_synopses,
    load_translations,
)
from lockstep.recipes.datasets.fashion_mnist import FASHION_MNIST, load_fashion_mnist
from lockstep.recipes.datasets.fetching import DataSet
from lockstep.recipes.datasets.minilm import MINILM, minilm_folder
from lockstep.recipes.datasets.mnist import MNIST, load_mnist
from lockstep.recipes.datasets.movielens import MOVIELENS_100K, load_ratings

DATA_SETS = (MNIST, FASHION_MNIST, MOVIELENS_100K, ADULT, DESCRIPTIONS, MINILM)
"""Those that `lockstep data` knows."""

__all__ = ["DATA_SETS", "DataSet", "fetch", "find", "load_adult", "load_fashion_mnist",
           "load_mnist", "load_ratings", "load_synopses", "load_translations",
           "minilm_folder"]  # fmt: skip


def find(name: str) -> DataSet:
    """The data set of this name.

    Raises:
        DataError: there is none.
    """
    for data_set in DATA_SETS:
        if data_set.name == name:
            return data_set
    raise DataError(
        "there is no such data set",
        expected=" or ".join(data_set.name for data_set in DATA_SETS),
        found=name,
        fix="lockstep data list",
    )


def fetch(name: str, folder: str | Path | None = None) -> Path:
    """Put the data set `name` into `folder` (default: the cache) and return it.

    Raises:
        DataError: there is no such data set, or it could not be downloaded.
        IntegrityError: what was downloaded differs from what was expected.
    """
    return find(name).fetch(folder)
