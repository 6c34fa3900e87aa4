"""Evaluating and predicting with a run's model: the same for any workers, whatever happens."""

from __future__ import annotations

import gzip
import json
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lockstep
from lockstep.data.records import open_records, samples_of
from lockstep.errors import DataError, JobError, ResourceError, RunFolderError, TaskError
from lockstep.results.prediction_file import PredictionFile, write_parquet
from tests.support import command
from tests.support.named_tasks import BATCH, Blobs, Fails, Predicts, blobs

RECORDS = 203


def trained(task: lockstep.Task, out: str, **settings: Any) -> lockstep.Result:
    settings = {"steps": 9, "batch_size": BATCH, "shards": 2, "threads": 1, **settings}
    return lockstep.run(task, workers=2, out=out, quiet=True, **settings)


def points(path: Path, first: float | None = None) -> Path:
    """A file of records. `first`: what the first coordinate of record 96 is."""
    rows = blobs(RECORDS, seed=5).tensors[0].tolist()
    if first is not None:
        rows[96][0] = first
    lines = [json.dumps({"id": f"é{i}", "point": row}) for i, row in enumerate(rows)]
    path.write_text("\n".join(lines) + "\n\n")
    return path


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_same_rows_for_any_number_of_workers(run_folder: str, tmp_path: Path) -> None:
    run = trained(Predicts(), run_folder)
    data = points(tmp_path / "points.jsonl")
    files = []
    for workers in (1, 2, 3):
        out = tmp_path / f"{workers}.jsonl"
        found = lockstep.predict(
            run.folder, data, out=out, keep=["id"], workers=workers, task=Predicts()
        )
        assert (found.records, found.resumed_at, found.deaths) == (RECORDS, 0, 0)
        files.append(out.read_bytes())
    assert files[0] == files[1] == files[2]
    rows = lines_of(out)
    assert [row["id"] for row in rows] == [f"é{i}" for i in range(RECORDS)]
    model = run.model()  # by hand, in batches of the same size
    with torch.no_grad():
        batches = blobs(RECORDS, seed=5).tensors[0].split(BATCH)
        wanted = torch.cat([model(batch) for batch in batches])
    assert torch.tensor([row["scores"] for row in rows]).equal(wanted)
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_stops(number: int, run_folder: str, tmp_path: Path) -> None:
    run = trained(Predicts(), run_folder)
    data = points(tmp_path / "points.jsonl", first=99.0)
    whole = tmp_path / "whole.jsonl"
    lockstep.predict(run.folder, data, out=whole, task=Predicts())
    mark, harmed = tmp_path / "mark", tmp_path / "harmed.jsonl"
    task = Predicts(str(mark), number)
    found = lockstep.predict(run.folder, data, out=harmed, task=task)
    assert mark.exists()
    assert found.deaths == 1
    assert harmed.read_bytes() == whole.read_bytes()


def test_an_interrupted_prediction_is_continued(run_folder: str, tmp_path: Path) -> None:
    run = trained(Predicts(), run_folder)
    data = points(tmp_path / "points.jsonl")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    settings: dict[str, Any] = {"batch_size": 4, "workers": 1}
    lockstep.predict(run.folder, data, out=whole, task=Predicts(), **settings)
    with pytest.raises(TaskError, match=r"not this one\n.*points\.jsonl, line 151"):
        lockstep.predict(run.folder, data, out=out, task=Fails(), **settings)
    assert not out.exists()
    (tmp_path / "out.jsonl.part").open("ab").write(b'{"torn')
    with pytest.raises(RunFolderError, match="was begun with another model"):
        lockstep.predict(run.folder, data, out=out, task=Fails(), batch_size=5, workers=1)
    found = lockstep.predict(run.folder, data, out=out, task=Predicts(), **settings)
    assert 0 < found.resumed_at <= 150
    assert out.read_bytes() == whole.read_bytes()
    with pytest.raises(RunFolderError, match="exists"):
        lockstep.predict(run.folder, data, out=out, task=Predicts(), **settings)


def test_parquet_in_and_out(run_folder: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    run = trained(Predicts(), run_folder)
    lines = points(tmp_path / "points.jsonl")
    write_parquet(lines, tmp_path / "points.parquet")
    wanted, out = tmp_path / "out.jsonl", tmp_path / "out.parquet"
    lockstep.predict(run.folder, lines, out=wanted, keep=["id"], task=Predicts())
    data = tmp_path / "points.parquet"
    lockstep.predict(run.folder, data, out=out, keep=["id"], task=Predicts())
    assert parquet.read_table(out).to_pylist() == lines_of(wanted)


def test_columns_of_one_type(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"a": 1}\n{"a": null, "b": "x"}\n{"a": 2.5}\n')
    write_parquet(mixed, tmp_path / "mixed.parquet")
    rows = parquet.read_table(tmp_path / "mixed.parquet").to_pylist()
    assert rows == [{"a": 1.0, "b": None}, {"a": None, "b": "x"}, {"a": 2.5, "b": None}]
    mixed.write_text('{"a": 1}\n{"a": "x"}\n')
    with pytest.raises(DataError, match="cannot become a Parquet file"):
        write_parquet(mixed, tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()


def test_evaluating_gives_the_run_s_own_numbers(run_folders: Callable[[], str]) -> None:
    run = trained(Blobs(), run_folders())
    wanted = {name: value for name, value in run.metrics.items() if name != "train_loss"}
    for workers in (1, 3):
        found = lockstep.evaluate(run.folder, workers=workers, task=Blobs())
        assert found.metrics == wanted
        assert (found.step, found.notes) == (9, ())
    half = trained(Blobs(), run_folders(), checkpoint_steps=4, steps=6)
    (half.folder / "result.json").unlink()
    for newest in sorted((half.folder / "checkpoints").iterdir())[-1:]:
        (newest / "manifest.json").write_text("{")
    found = lockstep.evaluate(half.folder, task=Blobs())
    assert found.step == 4
    assert any("passed over" in note for note in found.notes)
    assert any("not finished" in note for note in found.notes)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"point": [1]}\n[1]\n', "line 2 cannot be used"),
        ('{"point": [1]}\n\n{"point": \n', "line 3 cannot be used"),
    ],
)
def test_records_that_cannot_be_used(lines: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=says):
        list(map(open_records(path).__getitem__, range(2)))


def test_a_record_that_the_task_refuses(tmp_path: Path) -> None:
    """The task says what is wrong with it, and Lockstep which it is."""

    class Strict(Predicts):
        def from_record(self, record: Mapping[str, Any]) -> torch.Tensor:
            if "point" not in record:
                raise DataError("there is no point", fix="give one")
            return super().from_record(record)

    path = tmp_path / "records.jsonl"
    path.write_text('{"point": [1.0]}\n\n{"id": 2}\n')
    samples = samples_of(Strict(), {"path": path, "keep": []})
    assert samples[0].tolist() == [1.0]
    with pytest.raises(DataError, match=r"records\.jsonl, line 3: there is no point\n.*give one"):
        samples[1]


def test_begun_but_nothing_written(tmp_path: Path) -> None:
    """Then other data may have the name; with a row written they may not."""
    out = tmp_path / "out.jsonl"
    with PredictionFile(out, {"data": 1}):
        pass
    with PredictionFile(out, {"data": 2}) as rows:
        rows.add([{"a": 1}])
    with pytest.raises(RunFolderError, match="was begun with another model"):
        PredictionFile(out, {"data": 3})
    with PredictionFile(out, {"data": 2}) as rows:
        assert rows.rows == 1
        rows.finish()
    assert lines_of(out) == [{"a": 1}]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        open_records(tmp_path / "none.jsonl")
    (tmp_path / "bad.parquet").write_bytes(b"no")
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match="cannot be read"):
        open_records(tmp_path / "bad.parquet")


def test_a_task_that_predicts_nothing(run_folder: str, tmp_path: Path) -> None:
    run = trained(Blobs(), run_folder)
    data = points(tmp_path / "points.jsonl")
    with pytest.raises(JobError, match="handed over as an object"):
        lockstep.predict(run.folder, data, out=tmp_path / "out.jsonl")
    with pytest.raises(TaskError, match="does not say what a record is"):
        lockstep.predict(run.folder, data, out=tmp_path / "out.jsonl", task=Blobs())


@pytest.mark.parametrize("settings", [{"workers": 0}, {"workers": -1}, {"batch_size": 0}])
def test_settings_out_of_range(settings: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(JobError, match="is out of range"):
        lockstep.predict(tmp_path, tmp_path / "none", out=tmp_path / "out", **settings)  # type: ignore[arg-type]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="make the folder"):
        PredictionFile(tmp_path / "nowhere" / "out.jsonl", {})


def test_records_that_are_packed(tmp_path: Path) -> None:
    for name, content in {"a.jsonl.gz": b'{"a": "1"}', "b.csv.gz": b"a\r\n1\r\n"}.items():
        (tmp_path / name).write_bytes(gzip.compress(content))
        records = open_records(tmp_path / name)
        assert [records[index] for index in range(len(records))] == [{"a": "1"}]
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}')[:-4])
    with pytest.raises(DataError, match="cannot be read"):
        open_records(tmp_path / "c.jsonl.gz")


def test_records_from_csv(tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    path.write_text('\ufeffname,x\r\n"Ann, B",1\r\n\r\n"two\r\nlines",2\r\n3\r\n')
    records = open_records(path)
    assert [records[0], records[1]] == [
        {"name": "Ann, B", "x": "1"},
        {"name": "two\r\nlines", "x": "2"},
    ]
    with pytest.raises(DataError, match=r"records\.csv, line 6 cannot be used\n.*2 values"):
        records[2]


def test_csv_out(tmp_path: Path) -> None:
    with PredictionFile(tmp_path / "out.csv", {}) as rows:
        rows.add([{"id": 1, "text": 'a "b", c'}, {"id": 2, "scores": [0.5, None]}])
        rows.finish()
    assert (tmp_path / "out.csv").read_bytes().decode() == (
        'id,text,scores\r\n1,"a ""b"", c",\r\n2,,"[0.5, null]"\r\n'
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "out.csv"]


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet"])
def test_no_records_give_no_rows(name: str, run_folder: str, tmp_path: Path) -> None:
    run = trained(Predicts(), run_folder)
    (tmp_path / "none.jsonl").write_text("\n")
    out = tmp_path / name
    found = lockstep.predict(run.folder, tmp_path / "none.jsonl", out=out, task=Predicts())
    assert (found.records, found.out) == (0, out)
    assert out.exists()


def write_all(out: Path, rows: list[dict[str, Any]]) -> None:
    with PredictionFile(out, {}) as file:
        for start in range(0, len(rows), 500):
            file.add(rows[start : start + 500])


def test_a_full_disk_and_the_same_again(tmp_path: Path) -> None:
    rows, limit = [{"number": number} for number in range(5000)], 40_000
    out, known = tmp_path / "out.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, known[1]))
        with pytest.raises(ResourceError, match="the same command again"):
            write_all(out, rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, known)
        signal.signal(signal.SIGXFSZ, handler)
    assert not out.exists()
    with PredictionFile(out, {}) as file:
        assert file.rows % 500 == 0
        assert file.rows < 5000
        file.add(rows[file.rows :])
        file.finish()
    assert lines_of(out) == rows


def test_two_at_once(tmp_path: Path) -> None:
    with (
        PredictionFile(tmp_path / "out.jsonl", {"a": 1}),
        pytest.raises(RunFolderError, match="another process is writing"),
    ):
        PredictionFile(tmp_path / "out.jsonl", {"a": 1})


def test_the_commands(tmp_path: Path) -> None:
    name = f"{command.TASKS}:Predicts"
    ran = command.lockstep(
        "run", name, "--workers=2", "--shards=2", "--threads=1", "--steps=5", "--batch-size=16",
        "--out=run", "--quiet", cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    points(tmp_path / "points.jsonl")
    predicted = command.lockstep(
        "predict", "run", "points.jsonl", "--out=rows.jsonl", "--keep=id", "--keep", "point",
        cwd=tmp_path,
    )  # fmt: skip
    assert predicted.returncode == 0, predicted.stderr
    assert "203 records" in predicted.stdout
    rows = lines_of(tmp_path / "rows.jsonl")
    assert len(rows) == RECORDS
    assert rows[0].keys() > {"id", "point"}
    evaluated = command.lockstep("evaluate", "run", "--json", cwd=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["samples"] == 30
    nowhere = command.lockstep("predict", "run", "points.jsonl", "--out=-", cwd=tmp_path)
    assert nowhere.returncode != 0
    assert "predict writes to a file" in nowhere.stderr
    refused = command.lockstep("predict", "run", "points.jsonl", "--out=rows.jsonl", cwd=tmp_path)
    assert refused.returncode == RunFolderError.exit_code
    assert "exists" in refused.stderr
