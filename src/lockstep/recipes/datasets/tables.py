"""Tables: text with named columns, as CSV, TSV or RecBole's atomic files."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.data.user_files import read_content, text_of
from lockstep.errors import DataError

MISSING = "?"
"""The category of all values that are missing."""
SAY_MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})
"""Texts that mean a missing value, in lower case."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
WHOLE = re.compile(r"[+-]?\d{1,300}", re.ASCII)
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+", re.ASCII)
ATOMIC = re.compile(r":(token|float)(_seq)?$")
"""The suffix of a column's name in RecBole's files."""
LONGEST = 1 << 24
"""Most characters of a value; the default limit of Python's csv is 131,072."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Table: columns of one length, and their source."""

    source: str | Path
    columns: Mapping[str, list[str]]
    """By name."""
    lines: Sequence[int]
    """The line of the source in which each row begins, counted from 1."""

    def where(self, row: int) -> str:
        """A row, for messages."""
        return f"{self.source}, line {self.lines[row]}"


def parse_table(content: bytes, source: str | Path) -> Table:
    """A table from its text. The first line names the columns.

    Columns are separated by tabs if the first line has one, otherwise by commas or semicolons; with
    semicolons, numbers may have a decimal comma. Ignored are spaces around values, rows without
    values, and columns without a name, such as the row numbers that pandas writes.

    Raises:
        DataError: it is not UTF-8, has no rows, or its rows differ in length.
    """
    text = text_of(content, source)
    separator = _separator(text)
    rows = _rows(text, separator, source)
    _, header = next(rows, (1, []))
    if not header:
        raise _unusable(source, "an empty file")
    names = [ATOMIC.sub("", name) for name in header]
    doubled = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
    if doubled:
        raise _unusable(source, f"more than one column {', '.join(doubled)}")
    lines, kept = [], []
    for line, values in rows:
        if len(values) != len(names):
            raise _unusable(source, f"{len(values)} of {len(names)} columns in line {line}")
        lines.append(line)
        kept.append(values)
    if not kept:
        raise _unusable(source, f"no rows under the columns {', '.join(names)}")
    if separator == ";":
        kept = [
            [value.replace(",", ".") if DECIMAL_COMMA.fullmatch(value) else value for value in row]
            for row in kept
        ]
    columns = {name: [row[column] for row in kept] for column, name in enumerate(names) if name}
    return Table(source=source, columns=columns, lines=lines)


def read_table(path: str | Path) -> Table:
    """A table from a file of the user's; see `parse_table`.

    Raises:
        DataError: it cannot be read.
    """
    return parse_table(read_content(path), path)


def _separator(text: str) -> str:
    first = next(filter(str.strip, io.StringIO(text, newline="")), "")
    if "\t" in first:
        return "\t"
    # Names may be quoted, and contain the other separator.
    found = {one: len(next(csv.reader([first], delimiter=one), [])) for one in (",", ";")}
    return max(found, key=found.__getitem__)


def _rows(text: str, separator: str, source: str | Path) -> Iterator[tuple[int, list[str]]]:
    """The first line of each row, and its values; empty rows are left out."""
    # In a file separated by tabs, quotation marks are plain text. Elsewhere, without `strict`, one
    # that is never closed would make a single value of the rest.
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True,
        quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL,
    )  # fmt: skip
    limit, line = csv.field_size_limit(LONGEST), 1
    try:
        for row in reader:
            values = [value.strip() for value in row]
            if any(values):
                yield line, values
            line = reader.line_num + 1
    except csv.Error as error:
        raise _unusable(source, f"{error}, in what begins in line {line}") from error
    finally:
        csv.field_size_limit(limit)


def is_missing(text: str) -> bool:
    """Whether a value means that it is missing."""
    return text.strip().lower() in SAY_MISSING


def number_of(text: str) -> float | None:
    """A value as a finite number, or None."""
    number = float(text) if NUMBER.fullmatch(text.strip()) else math.nan
    return number if math.isfinite(number) else None


def numbers_of(values: Sequence[str]) -> list[float] | None:
    """A column as numbers, NaN where they are missing; None if one of its values is neither."""
    found = []
    for value in values:
        number = math.nan if is_missing(value) else number_of(value)
        if number is None:
            return None
        found.append(number)
    return found


def category(value: Any) -> str:
    """A value of a table or of a JSON record as a category: the same for the same value.

    13, 13.0 and 1.3e1 are one category, as are true and True, and all missing values.
    """
    text = "" if value is None else str(value).strip()
    if is_missing(text):
        return MISSING
    if text.lower() in ("true", "false"):
        return text.lower()
    if WHOLE.fullmatch(text):
        return str(int(text))  # also where a float would round it
    number = number_of(text)
    if number is None:
        return text
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)


def _unusable(source: str | Path, found: str) -> DataError:
    return DataError(
        f"{source} is not a table that can be read",
        expected="a line of distinct column names, then rows of as many values, "
        "separated by tabs, commas or semicolons",
        found=found,
        fix="convert it, or leave the path out",
    )
