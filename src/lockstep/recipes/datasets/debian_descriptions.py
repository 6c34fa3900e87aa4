"""Debian descriptions: descriptions of packages, their one-line synopses, and both in German.

The texts are those of Debian 12 (bookworm) as of its point release 12.15: the archive's own
translation lists, by the Debian Description Translation Project, joined on the digest that each
German text gives of the English one it translates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lockstep.recipes.datasets.fetching import DataSet, Files
from lockstep.recipes.datasets.packages import DebianLists
from lockstep.recipes.datasets.text_pairs import COLUMNS, Pair, parse_pairs

ENGLISH, GERMAN = "Translation-en", "Translation-de"
TRANSLATIONS, SYNOPSES = "translations.tsv", "synopses.tsv"
UNTRANSLATED = "<trans>"
"""Marks a part of a German text that has not been translated."""
FEWEST_WORDS = 20
"""A description with fewer words says no more than its synopsis."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """Description: one entry of a list."""

    synopsis: str
    paragraphs: tuple[str, ...]


def parse_list(content: bytes, language: str) -> dict[str, Description]:
    """The entries of a translation list by the MD5 of their English text; the last one of each."""
    found = {}
    for block in content.decode().split("\n\n"):
        fields: dict[str, list[str]] = {}
        for line in block.splitlines():
            if line.startswith(" "):
                fields.get(f"Description-{language}", []).append(line)
            else:
                name, _, value = line.partition(": ")
                fields[name] = [value]
        if f"Description-{language}" in fields:
            synopsis, *body = fields[f"Description-{language}"]
            (digest,) = fields["Description-md5"]
            found[digest] = Description(synopsis=synopsis, paragraphs=tuple(_paragraphs(body)))
    return found


def _paragraphs(body: list[str]) -> Iterator[str]:
    """The paragraphs of a text whose empty lines are dots, each on one line."""
    lines: list[str] = []
    for line in [*body, " ."]:
        if line.strip() != ".":
            lines.append(line)
        elif lines:
            yield " ".join(" ".join(lines).split())
            lines = []


def translations(english: dict[str, Description], german: dict[str, Description]) -> Iterator[Pair]:
    """Synopses and paragraphs with their translations.

    The paragraphs of a text are left out where the translation has another number of them.
    """
    for digest, source in english.items():
        target = german.get(digest)
        if target is None:
            continue
        pairs = [(source.synopsis, target.synopsis)]
        if len(source.paragraphs) == len(target.paragraphs):
            pairs += zip(source.paragraphs, target.paragraphs, strict=True)
        yield from (pair for pair in pairs if UNTRANSLATED not in pair[1])


def synopses(english: dict[str, Description]) -> Iterator[Pair]:
    """Descriptions that are long enough, with their synopses."""
    for entry in english.values():
        text = " ".join(entry.paragraphs)
        if len(text.split()) >= FEWEST_WORDS:
            yield text, entry.synopsis


def _table(pairs: Iterator[Pair]) -> bytes:
    rows = [COLUMNS, *((" ".join(a.split()), " ".join(b.split())) for a, b in pairs)]
    return "".join(f"{source}\t{target}\n" for source, target in rows).encode()


def _convert(files: Files) -> Files:
    """The lists as two tables of pairs."""
    english, german = parse_list(files[ENGLISH], "en"), parse_list(files[GERMAN], "de")
    return {
        TRANSLATIONS: _table(translations(english, german)),
        SYNOPSES: _table(synopses(english)),
    }


DESCRIPTIONS = DataSet(
    name="descriptions",
    about="55,000 descriptions of Debian packages with their synopses; 33,000 texts in German too",
    licence="those of the packages; the translations: GPL 2 or later",
    package=DebianLists("bookworm", "12.15", ("en", "de")),
    members={
        ENGLISH: "62f59c3cdca9786e4f7adf9002f9f5729a684adcb4667e58e448dec9b5a46c7f",
        GERMAN: "adac331fc51f9a00c1b4120b4ac87423be2b1f1615d4f288c7cbc2d5258c0650",
    },
    convert=_convert,
    converted={
        TRANSLATIONS: "67b0ad47eb5dfc19aeee2d5096ebe180a14253483a0d8cde1a231abbb679c36b",
        SYNOPSES: "d16b857808584e3a9d337fa13e2d582dd692d5de8973c0dfdb2a2d5a800f2957",
    },
)


def load_translations() -> list[Pair]:
    """English synopses and paragraphs, each with its German translation.

    Raises:
        DataError: the data have not been fetched.
        IntegrityError: they have been altered.
    """
    return parse_pairs(DESCRIPTIONS.read(TRANSLATIONS)[TRANSLATIONS], TRANSLATIONS)


def load_synopses() -> list[Pair]:
    """Descriptions of 20 words or more, each with its synopsis.

    Raises:
        DataError: the data have not been fetched.
        IntegrityError: they have been altered.
    """
    return parse_pairs(DESCRIPTIONS.read(SYNOPSES)[SYNOPSES], SYNOPSES)
