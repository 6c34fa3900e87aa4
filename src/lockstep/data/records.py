"""Records: the rows of a JSON lines, CSV or Parquet file, by number, as predictions take them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lockstep.data.user_files import GZIP, text_of
from lockstep.errors import DataError

if TYPE_CHECKING:
    from lockstep.job.task import Task

Record = dict[str, Any]
PARQUET = (".parquet", ".pq")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Records(Protocol):
    """Rows with named columns. May be used in forks of the process that opened them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    def where(self, index: int) -> str:
        """The file, and which of its lines or rows this is, counted from 1."""
        ...


class JsonLines:
    """A file with a JSON object per line. Empty lines do not count."""

    def __init__(self, path: Path, content: Path | None = None) -> None:
        self.path = path
        with (content or path).open("rb") as file:
            self._fd = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._fd)
            ends = np.cumsum([len(line) for line in file], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), ends[:-1]])
        filled = [bool(self._read(a, b).strip()) for a, b in zip(starts, ends, strict=False)]
        self._lines = np.flatnonzero(filled) + 1
        self._starts, self._ends = starts[filled], ends[filled]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Record:
        try:
            record = json.loads(self._read(self._starts[index], self._ends[index]))
        except ValueError as error:
            raise self._unusable(index, str(error)) from None
        if not isinstance(record, dict):
            raise self._unusable(index, f"a {type(record).__name__}")
        return record

    def _read(self, start: int, end: int) -> bytes:
        return os.pread(self._fd, int(end - start), int(start))  # forks share a file's position

    def where(self, index: int) -> str:
        return f"{self.path}, line {self._lines[index]}"

    def _unusable(self, index: int, found: str) -> DataError:
        return DataError(
            f"{self.where(index)} cannot be used",
            expected='a JSON object, such as {"text": "good"}',
            found=found,
            fix="mend the line, or leave it out",
        )


class ParquetRows:
    """A Parquet file's rows, read a row group at a time."""

    def __init__(self, path: Path, content: Path | None = None) -> None:
        parquet = pyarrow("parquet")
        self.path, self._content = path, content or path
        metadata = parquet.read_metadata(self._content)
        counts = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._group, self._rows = -1, []  # type: tuple[int, list[Record]]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Record:
        group = int(np.searchsorted(self._ends, index, side="right"))
        if group != self._group:
            with pyarrow("parquet").ParquetFile(self._content) as file:
                table = file.read_row_group(group, use_threads=False)
            self._group, self._rows = group, table.to_pylist()
        return self._rows[index - int(self._ends[group]) + len(self._rows)]

    def where(self, index: int) -> str:
        return f"{self.path}, row {index + 1}"


class CsvRows:
    """A CSV or TSV file's rows, by the names in its first line. Every value is text."""

    def __init__(self, path: Path, content: Path | None = None) -> None:
        self.path = path
        text = text_of((content or path).read_bytes(), path)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[path.suffix])
        self._names = next(reader, [])
        self._lines: list[int] = []
        self._rows: list[list[str]] = []
        for row in reader:
            if row:
                self._rows.append(row)
                self._lines.append(reader.line_num)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        if len(row) != len(self._names):
            raise DataError(
                f"{self.where(index)} cannot be used",
                expected=f"{len(self._names)} values, for {', '.join(self._names)}",
                found=f"{len(row)} values",
                fix="mend the line, or leave it out",
            )
        return dict(zip(self._names, row, strict=True))

    def where(self, index: int) -> str:
        return f"{self.path}, line {self._lines[index]}"


def open_records(path: str | Path, content: Path | None = None) -> Records:
    """The records of a file, by its name's ending; gzip may have packed it. There may be none.

    `content`: where its bytes are, if elsewhere.

    Raises:
        DataError: it cannot be read.
    """
    path = Path(path)
    try:
        with (content or path).open("rb") as file:
            packed = file.read(2) == GZIP
        if not packed:
            return _rows(path, content)
        name = path.with_suffix("") if path.suffix == ".gz" else path
        with tempfile.TemporaryFile() as unpacked:
            with gzip.open(content or path) as file:
                shutil.copyfileobj(file, unpacked)
            unpacked.flush()
            return _rows(name, Path(f"/proc/self/fd/{unpacked.fileno()}"))
    except (OSError, ValueError, EOFError, zlib.error) as error:  # also what pyarrow raises
        raise DataError(
            f"{path} cannot be read",
            expected="a file of JSON lines, or one named *.csv, *.tsv or *.parquet",
            found=str(error),
        ) from None


def _rows(path: Path, content: Path | None) -> Records:
    """The rows of a file that is not packed; they keep open what they need of it."""
    if path.suffix in PARQUET:
        return ParquetRows(path, content)
    return (CsvRows if path.suffix in DELIMITERS else JsonLines)(path, content)


def samples_of(task: Task, request: Mapping[str, Any], fd: int = -1) -> RecordDataset:
    """The samples of a file of records, `{"path", "keep"}`.

    `fd`: where another host's file is here. It has to stay open in this process and its forks.
    """
    content = None if fd < 0 else Path(f"/proc/self/fd/{fd}")
    return RecordDataset(task, open_records(request["path"], content), request["keep"])


class RecordDataset:
    """What a task makes of records: a data set for `collate`."""

    def __init__(self, task: Task, records: Records, keep: Sequence[str]) -> None:
        self.task, self.records, self.keep = task, records, keep

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Any:
        """The sample of a record; what `from_record` raises says of which."""
        record = self.records[index]
        try:
            return self.task.from_record(record)
        except DataError as error:
            raise DataError(
                f"{self.records.where(index)}: {error.what}",
                expected=error.expected,
                found=error.found,
                fix=error.fix,
            ) from None
        except Exception as error:
            error.add_note(f"The record is {self.records.where(index)}")
            raise

    def beside(self, indices: Sequence[int], rows: Sequence[Record]) -> list[Record]:
        """Rows of predictions, with the columns of the records that are kept before them.

        Raises:
            DataError: a record does not have one of them, or it is predicted as well.
        """
        return [{**self._kept(index, row), **row} for index, row in zip(indices, rows, strict=True)]

    def _kept(self, index: int, row: Record) -> Record:
        if not self.keep:
            return {}
        record = self.records[index]
        wrong = [name for name in self.keep if name not in record or name in row]
        if wrong:
            raise DataError(
                f"{self.records.where(index)} cannot be kept beside its predictions",
                expected="columns that it has, and that are not predicted",
                found=", ".join(wrong),
            )
        return {name: record[name] for name in self.keep}


def pyarrow(module: str) -> Any:
    """A module of pyarrow.

    Raises:
        DataError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{module}")
    except ImportError as error:
        raise DataError(
            "Parquet files need pyarrow",
            found=str(error),
            fix="pip install 'lockstep-dlp[parquet]', or use JSON lines",
        ) from None
