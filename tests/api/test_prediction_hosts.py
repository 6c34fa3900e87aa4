"""Evaluating and predicting on several hosts: the rows and numbers of one, whoever dies."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.data.records import samples_of
from lockstep.errors import JobError, RefusedError
from lockstep.results.prediction_file import write_parquet
from lockstep.system.shared_memory import Segment
from tests.end_to_end import test_data_partition as local
from tests.support.agents_on_loopback import Agents, Answers
from tests.support.multi_host_runs import Site, ended_well, site, yard
from tests.zoo.vectors import FEATURES, normal

__all__ = ["site", "yard"]  # fixtures

RECORDS = 500
SETTINGS: dict[str, Any] = {"batch_size": 20, "steps": 6, "shards": 3, "threads": 1, "quiet": True}


def points(path: Path, count: int) -> Path:
    """A file of so many records."""
    rows = normal(count, FEATURES, seed=9).tolist()
    lines = [json.dumps({"id": index, "point": row}) for index, row in enumerate(rows)]
    path.write_text("\n".join(lines))
    return path


class Trained:
    """A run whose task predicts, and records for it."""

    def __init__(self, site: Site, folder: Path, on: Agents | None = None, **changes: Any) -> None:
        self.site, self.folder = site, folder
        self.marks = folder / "marks"
        self.marks.mkdir()
        self.run = lockstep.run(
            "tests.support.agents_on_loopback:Answers", args={"folder": str(self.marks)},
            workers=3, on=on, out=site.yard.path(), **{**SETTINGS, **changes},
        )  # fmt: skip
        self.records = points(folder / "points.jsonl", RECORDS)

    def predict(self, name: str, on: Agents | None = None, **changes: Any) -> lockstep.Predicted:
        settings = {"keep": ["id"], "batch_size": 4, "out": self.folder / name, **changes}
        return lockstep.predict(
            self.run.folder, settings.pop("data", self.records), on=on, **settings
        )

    def hosts(self) -> set[str]:
        """Those that have predicted since the last call."""
        found = {path.name for path in self.marks.iterdir() if "-" not in path.name}
        for name in found:
            (self.marks / name).unlink()
        return found


def test_the_same_rows_on_several_hosts(site: Site, tmp_path: Path) -> None:
    """The records are sent, JSON lines and Parquet; the hosts have another number of workers."""
    pytest.importorskip("pyarrow.parquet")
    trained = Trained(site, tmp_path)
    trained.predict("alone.jsonl", workers=1)
    wanted = (tmp_path / "alone.jsonl").read_bytes()
    assert trained.hosts() == {"master"}
    write_parquet(trained.records, tmp_path / "points.parquet")
    for data in (trained.records, tmp_path / "points.parquet"):
        on = site.agents({"b": 1, "c": 2})
        found = trained.predict(f"on{data.suffix}.jsonl", on, data=data)
        assert (found.records, found.workers, found.deaths) == (RECORDS, 4, 0)
        assert (tmp_path / f"on{data.suffix}.jsonl").read_bytes() == wanted
        assert trained.hosts() == {"master", "b", "c"}
        ended_well(on)


@pytest.mark.parametrize("victims", [("b",), pytest.param(("b", "c"), marks=pytest.mark.long)])
def test_hosts_die_while_they_predict(site: Site, tmp_path: Path, victims: tuple[str, ...]) -> None:
    """The others do what they had to do, and go on."""
    trained = Trained(site, tmp_path)
    trained.predict("alone.jsonl")
    trained.hosts()
    for name in victims:
        (trained.marks / f"end-{name}").touch()
    on = site.agents({"b": 1, "c": 1})
    found = trained.predict("on.jsonl", on, batch_size=4)
    assert found.deaths == len(victims)
    assert sorted(note.split()[1] for note in found.notes) == list(victims)
    assert (tmp_path / "on.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    ended_well(on, *victims)


def test_a_host_with_another_vocabulary_is_refused(site: Site, tmp_path: Path) -> None:
    trained = Trained(site, tmp_path)
    (trained.marks / "fitted-b").write_text("other words")
    on = site.agents({"b": 1})
    with pytest.raises(RefusedError, match="host b may not take part") as refused:
        trained.predict("on.jsonl", on)
    assert "fitted is" in refused.value.found
    assert not (tmp_path / "on.jsonl").exists()
    on.wait()


@pytest.mark.long
def test_a_host_joins_while_others_predict(site: Site, tmp_path: Path) -> None:
    trained = Trained(site, tmp_path)
    many = points(tmp_path / "many.jsonl", 8 * RECORDS)
    trained.predict("alone.jsonl", data=many)
    assert trained.hosts() == {"master"}
    (trained.marks / "await-d").touch()
    on = site.agents({"b": 1})
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(trained.predict, "on.jsonl", on, data=many)
        await_file(trained.marks / "b")
        assert not found.done()
        on.start("d", 1)
        assert found.result().deaths == 0
    assert trained.hosts() == {"master", "b", "d"}
    assert (tmp_path / "on.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    ended_well(on)


def await_file(path: Path, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < limit, f"no {path}"
        time.sleep(0.01)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"ownership": "sharded"}, marks=pytest.mark.long),
        pytest.param({"compression": "topk", "groups": 3}, marks=pytest.mark.long),
        pytest.param({"local_steps": 2}, marks=pytest.mark.long),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_runs_of_every_kind(site: Site, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Whatever is divided among hosts in training, to predict and to evaluate each has all."""
    trained = Trained(site, tmp_path, site.agents({"b": 1, "c": 1}), **changes)
    trained.predict("alone.jsonl", workers=4)
    on = site.agents({"b": 1, "c": 1})
    trained.predict("on.jsonl", on)
    assert (tmp_path / "on.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    ended_well(on)
    again = site.agents({"b": 2})
    found = lockstep.evaluate(trained.run.folder, on=again)
    numbers = {name: value for name, value in trained.run.metrics.items() if name != "train_loss"}
    assert found.metrics == numbers
    assert found.workers == 3
    ended_well(again)


@pytest.mark.long
def test_evaluating_where_the_data_is(site: Site) -> None:
    """With `data: local` the hosts that have it have to be there; to predict, nobody has to."""
    on = site.agents({"b": 1, "c": 1})
    run = local.run(site, on)
    with pytest.raises(JobError, match="every host has a part of the data"):
        lockstep.evaluate(run.folder)
    fewer = site.agents({"b": 1})
    with pytest.raises(JobError, match="the run had other hosts"):
        lockstep.evaluate(run.folder, on=fewer)
    again = site.agents({"b": 1, "c": 2})
    found = lockstep.evaluate(run.folder, on=again, workers=9)
    numbers = {name: value for name, value in run.metrics.items() if name != "train_loss"}
    assert found.metrics == numbers
    assert found.workers == 7  # as many as there are shards
    ended_well(again)


def test_records_from_elsewhere(tmp_path: Path) -> None:
    """Their bytes are read where they are; errors name the file that the master has."""
    content = b'{"point": [1.0]}\n\n{"point": 2}\n'
    segment = Segment.create("data", len(content))
    segment.map[: len(content)] = content
    os.ftruncate(segment.fd, len(content))
    request = {"path": "/nowhere/points.jsonl", "keep": []}
    samples = samples_of(Answers(str(tmp_path)), request, segment.fd)
    assert len(samples) == 2
    assert samples[0].tolist() == [1.0]
    assert samples.records.where(1) == "/nowhere/points.jsonl, line 3"
    segment.close()
