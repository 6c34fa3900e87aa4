"""Hugging Face's `datasets`: the same bits from every form of them, and what is refused.

They are not in the environment that `make` makes, since pandas comes with them. To run these:
`pip install datasets`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import lockstep
from lockstep.adapters.transformers.hf_datasets import check_table
from lockstep.data.dataset_shipping import read_sets, write_sets
from lockstep.errors import JobError
from tests.adapters.test_transformers import bert
from tests.support import transformers_job as reviews

datasets = pytest.importorskip("datasets", reason="needs Hugging Face's datasets")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `map` keeps is kept here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    datasets.disable_progress_bars()


def raw() -> Any:
    """Texts, with numbered classes and a column that no model takes."""
    rows = [{**row, "idx": index} for index, row in enumerate(reviews.rows(48, seed=1))]
    table = datasets.Dataset.from_list(rows)
    return table.cast_column("label", datasets.ClassLabel(names=["bad", "good"]))


def tokenized() -> Any:
    tokenize = reviews.tokenizer()
    return raw().map(lambda rows: tokenize(rows["text"]), batched=True)


def lazily(rows: Any) -> Any:
    return {**reviews.tokenizer()(rows["text"]), "label": rows["label"]}


def test_the_same_bits_from_every_form(run_folders: Callable[[], str], tmp_path: Path) -> None:
    """In memory, on disk, as tensors, tokenized on the way, or made there; on 1 and 2 workers."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    table = tokenized()
    table.save_to_disk(tmp_path / "saved")
    forms = [
        (table, 1),
        (datasets.load_from_disk(tmp_path / "saved"), 2),
        (table.with_format("torch").rename_column("label", "labels"), 2),
        (raw().with_transform(lazily), 2),
        (tokenized, 1),
    ]
    collate = transformers.DataCollatorWithPadding(reviews.tokenizer())
    fingerprints = set()
    for form, workers in forms:
        task = lockstep.from_transformers(
            bert(), form, auto_class="AutoModelForSequenceClassification", collate=collate
        )
        result = lockstep.run(
            task, workers=workers, shards=2, threads=1, steps=3, batch_size=16, quiet=True,
            out=run_folders(),
        )  # fmt: skip
        fingerprints.add(result.fingerprint)
    assert len(fingerprints) == 1


def test_a_table_on_disk_is_not_copied(tmp_path: Path) -> None:
    """What goes to the workers is its path: they map the same file."""
    table = datasets.Dataset.from_dict({"input_ids": [list(range(100))] * 1000})
    table.save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(tmp_path / "saved")
    assert len(cloudpickle.dumps(table)) > 100_000 > 10 * len(cloudpickle.dumps(saved))


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_a_table_is_sent_to_other_hosts(form: str | None) -> None:
    """By `data: ship`, as samples without `datasets` there."""
    table = tokenized().with_format(form)
    segment = write_sets(table, None)
    try:
        sets, _ = read_sets(segment.fd, segment.nbytes)
    finally:
        segment.close()
    (found,), wanted = sets.__getitems__([5]), table[5]  # type: ignore[attr-defined]
    assert found.keys() == wanted.keys()
    assert {name: str(value) for name, value in found.items()} == {
        name: str(value) for name, value in wanted.items()
    }


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: datasets.DatasetDict({"train": raw(), "test": raw()}),
            r"several data sets\n(.*\n)*.*'train', 'test'\n.*dataset=data\['train'\]",
        ),
        (lambda: raw().to_iterable_dataset(), r"a stream.*\n(.*\n)*.*without streaming=True"),
        (lambda: raw().with_format("arrow"), r"tables, not samples\n(.*\n)*.*with_format\(None\)"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(JobError, match=says):
        check_table("dataset", make())
