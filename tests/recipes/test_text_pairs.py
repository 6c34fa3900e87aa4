"""Pairs of texts: out of Debian's lists, out of files, and split the same way in any order."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from lockstep.errors import DataError, IntegrityError
from lockstep.recipes.datasets import debian_descriptions, find
from lockstep.recipes.datasets.debian_descriptions import (
    DESCRIPTIONS,
    parse_list,
    synopses,
    translations,
)
from lockstep.recipes.datasets.packages import DebianLists
from lockstep.recipes.datasets.text_pairs import Split, parse_pairs, read_pairs, split_pairs

ENGLISH = """Package: one
Description-md5: 1111
Description-en: first  tool
 It does what one expects
 of a tool.
 .
 Paragraph two: é.

Package: two
Description-md5: 2222
Description-en: second tool
 It has three paragraphs.
 .
 This is the second.
 .
 This is the third.

Package: three
Description-md5: 3333
Description-en: third tool
 Nobody has translated it.

"""
GERMAN = """Package: one
Description-md5: 1111
Description-de: erstes Werkzeug
 Es tut, was man
 von einem Werkzeug erwartet.
 .
 <trans>

Package: two
Description-md5: 2222
Description-de: zweites Werkzeug
 Es hat drei Absätze.
 .
 Dies ist der letzte.

Package: gone
Description-md5: 9999
Description-de: altes Werkzeug
 Es hat keine Vorlage.
"""


def test_lists_are_joined_on_their_digests() -> None:
    english, german = parse_list(ENGLISH.encode(), "en"), parse_list(GERMAN.encode(), "de")
    assert english["1111"].paragraphs == (
        "It does what one expects of a tool.",
        "Paragraph two: é.",
    )
    assert list(translations(english, german)) == [
        ("first  tool", "erstes Werkzeug"),
        ("It does what one expects of a tool.", "Es tut, was man von einem Werkzeug erwartet."),
        ("second tool", "zweites Werkzeug"),  # whose paragraphs do not match
    ]


def test_short_descriptions_are_no_summaries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_descriptions, "FEWEST_WORDS", 11)
    text = "It has three paragraphs. This is the second. This is the third."
    found = list(synopses(parse_list(ENGLISH.encode(), "en")))
    assert found == [
        ("It does what one expects of a tool. Paragraph two: é.", "first  tool"),
        (text, "second tool"),
    ]


def test_tables_can_be_read_as_files_of_the_user(tmp_path: Path) -> None:
    files = debian_descriptions._convert({
        debian_descriptions.ENGLISH: ENGLISH.encode(), debian_descriptions.GERMAN: GERMAN.encode(),
    })  # fmt: skip
    table = files[debian_descriptions.TRANSLATIONS]
    assert parse_pairs(table, "it")[0] == ("first tool", "erstes Werkzeug")
    (tmp_path / "mine.tsv").write_bytes(table)
    assert read_pairs(tmp_path / "mine.tsv") == parse_pairs(table, "it")


# Fetching.

LISTS = DebianLists("bookworm", "12.15", ("en", "de"))


def serve(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], code: int = 0) -> list[list[str]]:
    """Let apt-get 'fetch' files; returns the list of the commands that were given."""
    asked: list[list[str]] = []

    def update(command: list[str], *, cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        for name, content in files.items():
            path = cwd / "lists" / f"archive_dists_bookworm_main_i18n_{name}"
            path.write_text(content)
        return subprocess.CompletedProcess(command, code, "", "E: no route to the archive\n")

    monkeypatch.setattr(subprocess, "run", update)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return asked


def test_lists_are_fetched_into_a_folder_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = serve(monkeypatch, {"Translation-en": ENGLISH, "Translation-de": GERMAN}, code=100)
    root = LISTS.unpack(["Translation-en", "Translation-de"], tmp_path)
    assert (root / "Translation-de").read_text() == GERMAN  # whatever apt says: it is there
    (command,) = asked
    assert "Acquire::Languages=en,de" in command
    assert f"Dir::State::lists={tmp_path}/lists" in command
    assert (tmp_path / "sources.list").read_text().endswith(" bookworm main\n")


def test_archive_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {"Translation-en": ENGLISH}, code=100)
    with pytest.raises(DataError, match="no route to the archive") as caught:
        LISTS.unpack(["Translation-en", "Translation-de"], tmp_path)
    assert "http://deb.debian.org/debian/dists/bookworm/InRelease" in caught.value.fix


def test_archive_without_one_of_the_languages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, {"Translation-en": ENGLISH})
    with pytest.raises(DataError, match="no Translation-de among what apt fetched"):
        LISTS.unpack(["Translation-en", "Translation-de"], tmp_path)


def test_machine_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DataError, match="no apt-get"):
        LISTS.unpack(["Translation-en"], tmp_path)


def test_lists_of_another_point_release_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, {"Translation-en": ENGLISH, "Translation-de": GERMAN})
    with pytest.raises(IntegrityError, match=r"InRelease is still 12\.15"):
        DESCRIPTIONS.fetch(tmp_path / "here")
    assert not (tmp_path / "here").exists()


def test_missing_descriptions_name_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find("descriptions").where() == "not here"
    with pytest.raises(DataError) as caught:
        debian_descriptions.load_translations()
    assert caught.value.fix == "lockstep data fetch descriptions"


# Splitting.

MANY = [(f"text number {n}", f"Text Nummer {n}") for n in range(200)]


def test_what_is_held_out_depends_on_no_order() -> None:
    split = split_pairs(MANY, "it")
    assert (len(split.train), len(split.held_out)) == (180, 20)
    assert sorted({*split.train, *split.held_out}) == sorted(MANY)
    mixed = MANY.copy()
    random.Random(0).shuffle(mixed)
    assert split_pairs(mixed, "it") == split
    lengths = [len(target) for _, target in split.held_out]
    assert lengths == sorted(lengths)
    # SHA-256 of the text: a change of this would change every run.
    assert split.held_out[0][0] == "text number 25"


def test_copies_of_what_is_held_out_are_not_learned_from() -> None:
    (held_out, *_) = split_pairs(MANY, "it").held_out
    copies = [(held_out[0].upper(), "Kopie"), (f"  {held_out[0].replace(' ', '  ')}", "zwei")]
    more = split_pairs([*copies, *MANY, *MANY], "it")
    assert len(more.train) + len(more.held_out) == len(MANY)
    assert not [pair for pair in more.train if pair[0].casefold() == held_out[0].casefold()]


def test_pairs_with_nothing_on_one_side_are_left_out() -> None:
    split = split_pairs([*MANY, ("", "nichts"), ("nothing", " ")], "it")
    assert split == split_pairs(MANY, "it")
    assert isinstance(split, Split)


def test_too_few_pairs() -> None:
    with pytest.raises(DataError, match="too few pairs to learn from in mine"):
        split_pairs(MANY[:19], "mine")


# Files of the user.


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".jsonl"])
def test_files_of_pairs(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine{ending}"
    if ending == ".jsonl":
        rows = [json.dumps({"target": b, "source": a, "more": 1}) for a, b in MANY]
    else:
        mark = "\t" if ending == ".tsv" else ","
        rows = [
            mark.join(row) for row in [("target", "id", "source"), *((b, "x", a) for a, b in MANY)]
        ]
    path.write_text("\n".join(rows) + "\n")
    assert read_pairs(path) == MANY


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("mine.tsv", b"english\tgerman\na\tb\n", "columns english, german"),
        ("mine.tsv", b"source\ttarget\na\n", "1 of 2 columns in line 2"),
        ("mine.tsv", b"source\ttarget\n\xff\tb\n", "0xff in line 2"),
        (
            "mine.jsonl",
            b'{"source": "a", "target": "b"}\n{"source": "a"}\n',
            "no 'target' in line 2",
        ),
        ("mine.jsonl", b'["a", "b"]\n', "in line 1"),
        ("mine.jsonl", b'{"source": "a", "target": 3}\n', "in line 1"),
        ("mine.jsonl", b"a\tb\n", "in line 1"),
        ("mine.jsonl", b"\xff\n", "mine.jsonl is not a text in UTF-8"),
    ],
)
def test_files_that_hold_no_pairs(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_pairs(tmp_path / name)


@pytest.mark.parametrize("name", ["mine.tsv", "mine.jsonl"])
def test_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_pairs(tmp_path / name)
