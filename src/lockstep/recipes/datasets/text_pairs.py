"""Text pairs: sources with targets, from a file, without duplicates, split by a hash.

Whether a pair is held out depends on hashes of the sources, never on the order of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lockstep.data.user_files import read_content, text_of
from lockstep.errors import DataError
from lockstep.recipes.datasets.tables import Table, parse_table, read_table

Pair = tuple[str, str]
"""A source and its target."""
COLUMNS = ("source", "target")
HELD_OUT = 500
"""The number of held-out pairs; of fewer than ten times as many pairs, a tenth."""
FEWEST = 20


@dataclass(frozen=True, kw_only=True)
class Split:
    """Split: training and held-out pairs. No source is in both, or twice in one."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


def parse_pairs(content: bytes, source: str | Path) -> list[Pair]:
    """Pairs from a table with the columns `source` and `target`.

    Raises:
        DataError: it is not such a table.
    """
    return _pairs(parse_table(content, source))


def read_pairs(path: str | Path) -> list[Pair]:
    """Pairs from a file of the user's.

    Args:
        path: `.jsonl` with an object in each line that has the texts `source` and `target`; any
            other name: a table (TSV or CSV) with columns of these names. `.gz` may follow.

    Raises:
        DataError: it cannot be read, or is not of that form.
    """
    if str(path).removesuffix(".gz").endswith(".jsonl"):
        return _from_lines(path)
    return _pairs(read_table(path))


def split_pairs(pairs: Iterable[Pair], name: str | Path, held_out: int = HELD_OUT) -> Split:
    """The pairs without duplicates; those with the smallest hashes of their sources are held out.

    Sources that differ only in case and spaces are the same; of the targets of one source, the one
    that sorts first is kept. Pairs without a source or a target are left out. Training pairs are
    sorted by hash, held-out ones by the length of the target, so that a batch has texts of similar
    length.

    Raises:
        DataError: there are too few.
    """
    found: dict[str, Pair] = {}
    for source, target in pairs:
        pair = (" ".join(source.split()), " ".join(target.split()))
        key = pair[0].casefold()
        if all(pair):
            found[key] = min(found.get(key, pair), pair, key=lambda one: (one[1], one[0]))
    if len(found) < FEWEST:
        raise DataError(
            f"there are too few pairs to learn from in {name}",
            expected=f"{FEWEST} or more sources that differ, each with a target",
            found=str(len(found)),
            fix="add pairs, or leave the path out",
        )
    hashed = [found[key] for key in sorted(found, key=_hash)]
    count = min(held_out, len(hashed) // 10)
    return Split(
        train=tuple(hashed[count:]),
        held_out=tuple(sorted(hashed[:count], key=lambda pair: (len(pair[1]), pair))),
    )


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _pairs(table: Table) -> list[Pair]:
    if not set(COLUMNS) <= table.columns.keys():
        raise _unusable(table.source, f"the columns {', '.join(table.columns)}")
    return list(zip(*(table.columns[column] for column in COLUMNS), strict=True))


def _from_lines(path: str | Path) -> list[Pair]:
    pairs = []
    # Not splitlines, which also splits at characters that JSON does not escape.
    for number, line in enumerate(text_of(read_content(path), path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            pair = (entry["source"], entry["target"])
            for text in pair:
                text.encode()  # half of a surrogate pair has no UTF-8 form
        except KeyError as error:
            raise _unusable(path, f"no {error} in line {number}") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _unusable(path, f"in line {number}: {error}: {line:.60}") from error
        pairs.append(pair)
    return pairs


def _unusable(name: str | Path, found: str) -> DataError:
    return DataError(
        f"{name} is not a file of pairs",
        expected="a table (TSV or CSV) with the columns source and target, or .jsonl with an "
        "object in each line that has them",
        found=found,
        fix="convert it, or leave the path out",
    )
