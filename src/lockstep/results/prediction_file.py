"""Prediction file: rows in order, which the same command resumes after a crash.

Rows are written as JSON lines to `NAME.part`. The journal `NAME.part.json` records how many are
on disk, and the identity of the prediction. When all rows are there, the file is renamed to `NAME`,
or converted to what the name's ending says: CSV or Parquet.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lockstep.data.records import DELIMITERS, PARQUET, JsonLines, pyarrow
from lockstep.errors import DataError, RunFolderError, disk_errors
from lockstep.system.json_files import plain, write_json

JOURNAL_SECONDS = 1.0
"""The time between two writes of the journal: the most work that a crash can lose."""
AGAIN = "give the same command again to resume"
CHUNK = 1 << 14
"""Rows in a Parquet row group."""


class PredictionFile:
    """Prediction file: the output of one prediction, as a context manager."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        """`identity`: what the rows depend on. Rows of another identity are not continued.

        Raises:
            RunFolderError: the file exists, cannot be made, is being written, or was begun by
                another prediction.
            DataError: the file is Parquet, and pyarrow is missing.
        """
        self.path, self.identity = path, identity
        self._part = path.with_name(path.name + ".part")
        self._journal = path.with_name(path.name + ".part.json")
        self.rows = 0
        """The number of rows written."""
        if path.suffix in PARQUET:
            pyarrow("parquet")  # so that it is not found missing after all the work
        if path.exists():
            raise RunFolderError(
                f"{path} exists", expected="a path that does not exist", fix="choose another"
            )
        try:
            self._file = self._part.open("ab")
        except OSError as error:
            raise RunFolderError(
                f"{path} cannot be written",
                expected="a path in an existing folder that can be written to",
                found=str(error),
                fix="make the folder, or choose another",
            ) from None
        try:
            self._continue()
        except BaseException:
            self._file.close()
            raise
        self._journalled = time.monotonic()

    def __enter__(self) -> PredictionFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._file.closed:
            try:
                self._write_journal()
            finally:
                # Rows that a full disk could not take are not counted by the journal.
                with contextlib.suppress(OSError):
                    self._file.close()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows."""
        with disk_errors("the predictions", AGAIN):
            content = b"".join(json.dumps(plain(row)).encode() + b"\n" for row in rows)
            self._file.write(content)
        self.rows += len(rows)
        self._bytes += len(content)
        if time.monotonic() - self._journalled >= JOURNAL_SECONDS:
            self._write_journal()

    def finish(self) -> None:
        """Complete the file: all rows are written."""
        self._write_journal()
        self._file.close()
        with disk_errors("the predictions", AGAIN):
            convert = write_parquet if self.path.suffix in PARQUET else write_csv
            if self.path.suffix in (*PARQUET, *DELIMITERS):
                made = self._part.with_suffix(".made")
                convert(self._part, made)
                made.rename(self.path)
                self._part.unlink()
            else:
                self._part.rename(self.path)
            self._journal.unlink()

    def _continue(self) -> None:
        """Keep the rows of an interrupted attempt that its journal counts."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunFolderError(
                f"another process is writing {self._part}", fix="wait for it, or stop it"
            ) from None
        self._bytes = 0
        if self._journal.exists():
            known = self._read_journal()
            # With no rows yet the identity may change: the user may just have mended a record.
            if known.get("rows") != 0 and known.get("identity") != self.identity:
                raise RunFolderError(
                    f"{self._part} was begun with another model, other data or settings",
                    expected=json.dumps(self.identity),
                    found=json.dumps(known.get("identity")),
                    fix=f"choose another name, or remove {self._part} and {self._journal}",
                )
            self.rows, self._bytes = known["rows"], known["bytes"]
        os.ftruncate(self._file.fileno(), self._bytes)

    def _read_journal(self) -> dict[str, Any]:
        try:
            known: dict[str, Any] = json.loads(self._journal.read_text())
        except ValueError as error:
            raise RunFolderError(
                f"{self._journal} is not readable: {error}",
                fix=f"remove it and {self._part}, and begin again",
            ) from None
        return known

    def _write_journal(self) -> None:
        with disk_errors("the predictions", AGAIN):
            self._file.flush()
            os.fsync(self._file.fileno())
            done = {"rows": self.rows, "bytes": self._bytes, "identity": self.identity}
            write_json(self._journal, done)
        self._journalled = time.monotonic()


def write_csv(lines: Path, path: Path) -> None:
    """JSON lines as a CSV file, or as a TSV file by the lines' name (`NAME.tsv.part`).

    The columns are those of all rows, as they come; what is no text or number is JSON.
    """
    rows = JsonLines(lines)
    names = dict.fromkeys(name for index in range(len(rows)) for name in rows[index])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, delimiter=DELIMITERS[lines.with_suffix("").suffix])
        writer.writeheader()
        for index in range(len(rows)):
            writer.writerow({name: _cell(value) for name, value in rows[index].items()})


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | None) else json.dumps(value)


def write_parquet(lines: Path, path: Path) -> None:
    """JSON lines as a Parquet file; a column's type is one that all of its values have.

    Raises:
        DataError: a column has no such type.
    """
    arrow, parquet = pyarrow("lib"), pyarrow("parquet")
    try:
        schema = None
        for table in _tables(lines, None):
            schemas = [table.schema] if schema is None else [schema, table.schema]
            schema = arrow.unify_schemas(schemas, promote_options="permissive")
        with parquet.ParquetWriter(path, schema or arrow.schema([])) as writer:
            for table in _tables(lines, schema):
                writer.write_table(table)
    except arrow.ArrowException as error:
        path.unlink(missing_ok=True)
        raise DataError(
            f"{lines} cannot become a Parquet file",
            expected="values of one type in each column",
            found=str(error),
            fix=f"the predictions are in {lines}, as JSON lines",
        ) from None


def _tables(lines: Path, schema: Any) -> Iterator[Any]:
    arrow = pyarrow("lib")
    rows = JsonLines(lines)
    for start in range(0, len(rows), CHUNK):
        chunk = [rows[index] for index in range(start, min(start + CHUNK, len(rows)))]
        names = (
            schema.names if schema is not None else list(dict.fromkeys(n for r in chunk for n in r))
        )
        columns = {name: [row.get(name) for row in chunk] for name in names}
        yield arrow.Table.from_pydict(columns, schema=schema)
