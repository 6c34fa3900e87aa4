"""What looks like a data set and is none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lockstep.data.user_datasets import length_of
from lockstep.errors import DataError


class DataFrame:
    """As that of pandas: it has a length and items, which are columns."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, column: str) -> Any:
        raise KeyError(column)

    def to_numpy(self) -> Any:
        return np.zeros((100, 4))


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        ("data/train.csv", "the text 'data/train.csv'"),
        (b"data", "the text b'data'"),
        ((np.zeros((100, 4)), np.zeros(100, int)), "2 arrays, of the shapes (100, 4), (100,)"),
        ((torch.zeros(9, 4), np.zeros((9, 4))), "2 arrays"),
        ([np.zeros((100, 4)), np.zeros(100, int)], "a list of 2 arrays"),
        (DataFrame(), "a DataFrame"),
    ],
)
def test_paths_and_columns_are_refused(wrong: Any, found: str) -> None:
    with pytest.raises(DataError, match="did not return a map-style data set") as caught:
        length_of(wrong, "train_data")
    assert found in caught.value.found


@pytest.mark.parametrize(
    "right",
    [
        (torch.zeros(3), torch.ones(3)),
        [torch.zeros(1), torch.zeros(1)],
        [(torch.zeros(3), 1)],
        (torch.zeros(2), torch.ones(3)),
    ],
)
def test_samples_in_a_tuple_or_a_list(right: Any) -> None:
    assert length_of(right, "train_data") == len(right)
