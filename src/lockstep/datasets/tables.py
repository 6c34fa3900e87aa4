"""Tables of text with named columns: CSV, TSV, and RecBole's atomic files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from lockstep.errors import DataError

Table = dict[str, list[str]]
"""Columns by name, all of one length."""


def parse_table(content: bytes, source: str | Path) -> Table:
    """A table from its text. The first line names the columns; what follows a `:` is left out.

    Columns are separated by tabs if the first line has one, else by commas.

    Raises:
        DataError: it is not UTF-8, has no rows, or its rows differ in length.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise _unusable(source, str(error)) from error
    first = text.partition("\n")[0]
    # Quotation marks mean nothing in a file separated by tabs.
    if "\t" in first:
        rows = csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(io.StringIO(text), skipinitialspace=True)
    try:
        header, *lines = [row for row in rows if row]
    except ValueError:
        raise _unusable(source, "an empty file") from None
    except csv.Error as error:
        raise _unusable(source, str(error)) from error
    names = [name.partition(":")[0].strip() for name in header]
    for number, line in enumerate(lines, start=2):
        if len(line) != len(names):
            raise _unusable(source, f"{len(line)} of {len(names)} columns in row {number}")
    if not lines or len(set(names)) < len(names):
        raise _unusable(source, f"{len(lines)} rows of the columns {', '.join(names)}")
    return {name: [line[place] for line in lines] for place, name in enumerate(names)}


def read_table(path: str | Path) -> Table:
    """A table from a file of the user's, as `parse_table` has it.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise _unusable(path, str(error)) from error
    return parse_table(content, path)


def numbers_of(values: list[str]) -> list[float] | None:
    """A column as numbers, or None if one of its values is none."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return None


def _unusable(source: str | Path, found: str) -> DataError:
    return DataError(
        f"{source} is not a table that can be read",
        expected="a line of distinct column names, then rows of as many values, "
        "separated by tabs or commas, in UTF-8",
        found=found,
        fix="convert it, or leave the path out",
    )
