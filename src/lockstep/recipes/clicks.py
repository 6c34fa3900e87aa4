"""Recipe `clicks`: a binary label from hashed categorical features, as in click prediction.

Every value of a table becomes a category, and every category a hash bucket. The model is a
factorisation machine with a network (DeepFM: Guo, Tang, Ye, Li and He, 2017). The default table is
`adult`: who earns more than 50,000. One fifth of the rows is held out. `docs/applications.md`
reports metrics and times.
"""

from __future__ import annotations

import bisect
import functools
import json
import shlex
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import TensorDataset

from lockstep.errors import DataError
from lockstep.job.job import Job
from lockstep.job.task import Parameters, Task
from lockstep.recipes import at_least, texts
from lockstep.recipes.datasets import load_adult
from lockstep.recipes.datasets.tables import (
    MISSING,
    Table,
    category,
    is_missing,
    number_of,
    numbers_of,
    read_table,
)

BATCH_SIZE = 256
BUCKETS = 1 << 14
QUANTILES = 40
"""A numeric column with more distinct values than this is divided into ranges."""
HELD_OUT = 5
"""One row in `HELD_OUT` is held out."""


def clicks(
    data: str | None = None, label: str = "income", epochs: float = 6, width: int = 16,
    categories: str | None = None,
) -> Job:  # fmt: skip
    """Predict the probability of a yes.

    Args:
        data: A table (CSV or TSV) with named columns. None: the data set `adult`.
        label: The column to predict, with one of two values in each row; the one that sorts last
            means yes.
        epochs: Passes over the data.
        width: Length of the embeddings.
        categories: Columns, separated by commas, whose numbers are names and not amounts, such as
            `zip,shop`.
    """
    texts(data=data, label=label, categories=categories)
    at_least(1, width=width)
    named = tuple(name.strip() for name in (categories or "").split(",") if name.strip())
    task = Clicks(data, label, width, named)
    return Job(task=task, batch_size=BATCH_SIZE, eval_batch_size=1024, data_epochs=epochs)


class DeepFM(nn.Module):
    """DeepFM: log-odds as a sum of category weights, pairwise products and a network's output."""

    def __init__(self, fields: int, width: int) -> None:
        super().__init__()
        self.alone = nn.Embedding(BUCKETS, 1)
        self.factors = nn.Embedding(BUCKETS, width)
        self.deep = nn.Sequential(
            nn.Linear(fields * width, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 1)
        )
        nn.init.zeros_(self.alone.weight)
        nn.init.normal_(self.factors.weight, std=0.05)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Buckets `[n, fields]` (int64) to log-odds `[n]`."""
        factors = self.factors(features)
        pairs = (factors.sum(dim=1).square() - factors.square().sum(dim=1)).sum(dim=1) / 2
        deep = self.deep(factors.flatten(1)).squeeze(1)
        odds: torch.Tensor = self.alone(features).sum(dim=(1, 2)) + pairs + deep
        return odds


class Clicks(Task):
    """Task of the recipe `clicks`."""

    scheduler_interval = "data_epoch"

    def __init__(
        self,
        data: str | None = None,
        label: str = "income",
        width: int = 16,
        categories: Sequence[str] = (),
    ) -> None:
        self.data, self.label, self.width, self.categories = data, label, width, categories

    @property
    def rows(self) -> Rows:
        """The rows of the table, read on first use."""
        return self._read[0]

    @property
    def ranges(self) -> Ranges:
        """The ranges of the columns, from the training rows."""
        return self._read[1]

    @functools.cached_property
    def _read(self) -> tuple[Rows, Ranges]:
        table = load_adult() if self.data is None else read_table(self.data)
        yes = answers_of(table, self.label)
        # The legacy generator is the one whose stream NumPy promises never to change (NEP 19).
        held_out = np.random.RandomState(0).permutation(len(yes)) < len(yes) // HELD_OUT
        parts = {(answer, held) for answer, held in zip(yes.tolist(), held_out, strict=True)}
        if len(parts) < 4:
            raise _unusable(table, self.label, f"{yes.sum()} yes and {(~yes).sum()} no")
        features = {name: each for name, each in table.columns.items() if name != self.label}
        self._check_categories(table, features)
        check_numbers(table, [name for name in features if name not in self.categories])
        ranges = ranges_of(features, ~held_out, self.categories)
        buckets = torch.from_numpy(hashed(features, ranges))
        return (buckets, torch.from_numpy(yes).float(), torch.from_numpy(held_out)), ranges

    def _check_categories(self, table: Table, features: Mapping[str, object]) -> None:
        for name in self.categories:
            if name not in features:
                raise DataError(
                    f"there is no column {name} in {table.source} to be one of categories",
                    expected=f"some of {', '.join(features)}",
                    found=f"--categories {','.join(self.categories)}",
                )

    def model(self) -> nn.Module:
        """A fresh DeepFM."""
        return DeepFM(self.rows[0].shape[1], self.width)

    def train_data(self) -> TensorDataset:
        """`(buckets, yes or no)` of the training rows."""
        features, labels, held_out = self.rows
        return TensorDataset(features[~held_out], labels[~held_out])

    def eval_data(self) -> TensorDataset:
        """`(buckets, yes or no)` of the held-out rows."""
        features, labels, held_out = self.rows
        return TensorDataset(features[held_out], labels[held_out])

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross-entropy."""
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(params, lr=2e-3, weight_decay=0.02)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> ExponentialLR:
        """A learning rate that halves every data epoch."""
        return ExponentialLR(optimizer, gamma=0.5)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | float]:
        """Per row, `[n]`: the cross-entropy, and whether the likelier answer is correct."""
        odds = model(batch[0])
        return {
            "loss": F.binary_cross_entropy_with_logits(odds, batch[1], reduction="none"),
            "accuracy": (odds > 0) == (batch[1] > 0),
        }

    def outputs(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """Per row, `[n]`: the log-odds, and the answer."""
        return {"odds": model(batch[0]), "yes": batch[1] > 0}

    def score(self, outputs: dict[str, Any]) -> dict[str, float]:
        """The area under the ROC curve."""
        return {"auc": auc(outputs["odds"], outputs["yes"])}

    def baseline(self) -> dict[str, float]:
        """AUC and accuracy of naive Bayes on the same categories."""
        features, labels = self.train_data().tensors
        held_out, answers = self.eval_data().tensors
        counts = [
            torch.bincount(features[labels == answer].flatten(), minlength=BUCKETS) + 1.0
            for answer in (0, 1)
        ]
        prior = labels.mean().logit()
        weight = (counts[1] / (labels == 1).sum() / (counts[0] / (labels == 0).sum())).log()
        odds = weight[held_out].sum(dim=1) + prior
        right = ((odds > 0) == (answers > 0)).double().mean().item()
        return {"auc": auc(odds, answers > 0), "accuracy": right}

    def fitted(self) -> str:
        """The columns, with the ranges of numeric ones."""
        return json.dumps(self.ranges)

    def from_record(self, record: Mapping[str, Any]) -> torch.Tensor:
        """The buckets `[fields]` of a row, from the columns of the table without the label."""
        missing = [name for name in self.ranges if name not in record]
        try:
            row = {name: [record[name]] for name in self.ranges}
            return torch.from_numpy(hashed(row, self.ranges))[0]
        except (KeyError, ValueError) as error:
            raise DataError(
                "a record is not a row of the table",
                expected=f"the columns {', '.join(self.ranges)}",
                found=f"none of {', '.join(missing)}" if missing else str(error),
                fix="give each record all of these columns; others are ignored",
            ) from None

    def predict(self, model: nn.Module, features: torch.Tensor) -> list[dict[str, Any]]:
        """For each row of buckets (`[n, fields]`), the probability of a yes."""
        return [{"probability": p} for p in model(features).sigmoid().tolist()]


def answers_of(table: Table, label: str) -> NDArray[np.bool_]:
    """The rows whose label means yes, `[rows]`.

    Raises:
        DataError: the column `label` does not have two values, or is the only one.
    """
    texts = table.columns.get(label)
    if texts is None or len(table.columns) < 2:
        raise _unusable(table, label, f"the columns {', '.join(table.columns)}")
    for row, text in enumerate(texts):
        if is_missing(text):
            raise _unusable(table, label, f"{text!r} in line {table.lines[row]}")
    found = np.array([category(text) for text in texts])
    values, counts = np.unique(found, return_counts=True)
    if len(values) != 2 or len(found) < 2 * HELD_OUT:
        listed = [f"{value:.40} ({count})" for value, count in zip(values, counts, strict=True)]
        raise _unusable(table, label, ", ".join([*listed[:5], "..."] if listed[5:] else listed))
    yes: NDArray[np.bool_] = found == values[1]
    return yes


def _unusable(table: Table, label: str, found: str) -> DataError:
    return DataError(
        f"the column {label} of {table.source} cannot be learned",
        expected=f"one of two values in each of {2 * HELD_OUT} rows or more, both in the training "
        "and in the held-out rows, and another column",
        found=found,
        fix="name the label: --label COLUMN; or mend these rows, or add some",
    )


Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Buckets `[n, fields]`, yes or no `[n]` (float), and whether a row is held out `[n]` (bool)."""
Ranges = dict[str, list[float] | None]
"""By column: the ascending ends of its ranges; None: its values are categories."""


def check_numbers(table: Table, columns: Sequence[str]) -> None:
    """Check that columns of numbers have nothing else: one `12 EUR` would make categories of all.

    A column of numbers is one in which most values are numbers, too many to be categories.

    Raises:
        DataError: a value of such a column is neither a number nor missing.
    """
    for column in columns:
        values = table.columns[column]
        numbers = [number_of(value) for value in values]
        wrong = [
            row
            for row, value in enumerate(values)
            if numbers[row] is None and not is_missing(value)
        ]
        found = [number for number in numbers if number is not None]
        if wrong and len(found) >= len(wrong) and len(set(found)) > QUANTILES:
            more = f", and {len(wrong) - 1:,} more such rows" if wrong[1:] else ""
            raise DataError(
                f"{table.where(wrong[0])}: the column {column} has a value that is not a number",
                expected=f"finite numbers, as in {len(found):,} other rows, or nothing if missing",
                found=f"{values[wrong[0]]!r:.60}{more}",
                fix=f"mend the value or leave it empty; or, if numbers are names there: "
                f"--categories {shlex.quote(column)}",
            )


def ranges_of(
    columns: Mapping[str, Sequence[str]],
    known: NDArray[np.bool_],
    categories: Sequence[str] = (),
) -> Ranges:
    """The ranges of numeric columns that are not `categories`, from the rows that are `known`."""
    ranges: Ranges = {}
    for name, values in columns.items():
        numbers = np.array(([] if name in categories else numbers_of(values)) or [], float)
        ranges[name] = None
        if len(np.unique(numbers[~np.isnan(numbers)])) > QUANTILES:
            rows, cuts = numbers[known], np.linspace(0, 1, QUANTILES + 1)[1:-1]
            rows = rows[~np.isnan(rows)]
            # Quantiles of the rows, and of the distinct values in case most rows have the same one.
            edges = [np.quantile(each, cuts) for each in (rows, np.unique(rows)) if len(each)]
            ranges[name] = np.unique(np.concatenate([[], *edges])).tolist()
    return ranges


def hashed(columns: Mapping[str, Sequence[Any]], ranges: Ranges) -> NDArray[np.int64]:
    """The bucket of each value, `[rows, columns]`.

    Raises:
        ValueError: a value of a column of ranges is neither a number nor missing.
    """
    found = []
    for name, edges in ranges.items():
        values = [category(value) for value in columns[name]]
        buckets = {value: _bucket(name, value, edges) for value in set(values)}
        found.append([buckets[value] for value in values])
    return np.array(found, np.int64).T.copy()


def _bucket(name: str, value: str, edges: list[float] | None) -> int:
    if edges is not None and value != MISSING:
        number = number_of(value)
        if number is None:
            raise ValueError(f"{value!r:.60} in the column {name}, which has numbers")
        value = str(bisect.bisect_left(edges, number))
    return zlib.crc32(f"{name}={value}".encode()) % BUCKETS


def auc(scores: torch.Tensor, yes: torch.Tensor) -> float:
    """The probability that a yes scores higher than a no, where equal scores count half.

    `scores` and `yes` (bool) are `[n]`; NaN if all answers are the same.
    """
    _, index, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[index]
    ones, zeros = int(yes.sum()), int((~yes).sum())
    if not ones or not zeros:
        return float("nan")
    above = ranks[yes].sum().item() - ones * (ones + 1) / 2
    return float(above / (ones * zeros))
