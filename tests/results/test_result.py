"""Results in other forms: columns, a table in a notebook, a name and tags."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.errors import JobError
from lockstep.results.result import Result, as_columns
from tests.support.metric_task import Metric

SETTINGS: dict[str, Any] = {
    "batch_size": 20, "data_epochs": 3, "workers": 1, "shards": 2, "quiet": True
}  # fmt: skip


def test_columns() -> None:
    rows: list[dict[str, Any]] = [{"a": 1, "b": 2.0}, {"a": 2}, {"c": 3}]
    found = as_columns(rows)
    assert {name: len(column) for name, column in found.items()} == {"a": 3, "b": 3, "c": 3}
    assert found["a"][:2] == [1, 2]
    assert math.isnan(found["b"][1])
    assert math.isnan(found["c"][0])
    assert as_columns([]) == {}


def test_a_named_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = lockstep.run(
        Metric([1.0, 0.5, 2.0]), run_name="größer & <b>", tags=["a", "b"], monitor="value",
        **SETTINGS,
    )  # fmt: skip
    assert result.folder == Path("runs/größer & <b>-1")
    manifest = json.loads((result.folder / "manifest.json").read_text())
    assert manifest["name"] == "größer & <b>"
    assert manifest["job"]["tags"] == ["a", "b"]
    assert result.history_table()["value"] == [1.0, 0.5, 2.0]
    assert result.history_table()["step"] == [3, 6, 9]
    for each in (result, Result.open(result.folder)):
        page = each._repr_html_()
        assert "runs/größer &amp; &lt;b&gt;-1" in page
        assert "value 0.5, step-00000006" in page
        assert result.fingerprint in page
        assert "stopped early" not in page


@pytest.mark.parametrize("name", ["a/b", "..", ".a", "a\nb", "a\0", ""])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(JobError, match="run_name"):
        lockstep.Job(task="", run_name=name)
