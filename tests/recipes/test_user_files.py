"""Files as people have them: read as they are meant, or refused by their line before a run."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.errors import DataError
from lockstep.recipes.datasets import load_mnist, load_ratings
from lockstep.recipes.datasets.images import read_images
from lockstep.recipes.datasets.tables import (
    category,
    number_of,
    numbers_of,
    parse_table,
    read_table,
)
from lockstep.recipes.datasets.text_pairs import read_pairs, split_pairs
from lockstep.recipes.mnist import Mnist
from lockstep.recipes.summarise import summarise
from lockstep.recipes.vision import Vision

WANTED = {"a": ["1", "2.5"], "b": ["x, y", "z"]}


# Tables.


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbfa,b\r\n1,"x, y"\r\n2.5,z\r\n\r\n',
        b'a;b\n1;x, y\n2,5;z\n',
        b'a\tb\r\n 1\tx, y\r\n2.5\tz\t\r\n'.replace(b"z\t", b"z"),
        b'"a" ,"b"\n 1 ,"x, y"\n2.5,z\n'.replace(b'"a" ', b'"a"'),
        b',a,b\n0,1,"x, y"\n1,2.5,z\n',
        b'a,b,\n1,"x, y",\n,,\n2.5,z,\n,,\n',
        b'\n\na,b\n1,"x, y"\n2.5,z',
        b'a,b\r1,"x, y"\r2.5,z\r',
        b'"b","a"\n"x, y","1"\n"z","2.5"\n',
        gzip.compress(b'a,b\n1,"x, y"\n2.5,z\n'),
    ],
    ids=["windows", "semicolons", "tabs", "spaces", "row-numbers", "empty-rows", "empty-first",
         "old-mac", "other-order", "gzip"],
)  # fmt: skip
def test_tables_as_people_have_them(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(content)
    assert read_table(tmp_path / "mine.csv").columns == WANTED


def test_values_of_several_lines_and_very_long_ones() -> None:
    text = 'a,b\n"one\ntwo, ""three""",x\n' + "y" * 200_000 + ",😀 中文\n"
    table = parse_table(text.encode(), "t")
    assert table.columns["a"] == ['one\ntwo, "three"', "y" * 200_000]
    assert table.columns["b"] == ["x", "😀 中文"]
    assert [table.where(row) for row in (0, 1)] == ["t, line 2", "t, line 4"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a,b\n1,2\n\n1\n", "1 of 2 columns in line 4"),
        (b"a,b\n1,2\n1,2,3\n", "3 of 2 columns in line 3"),
        (b'a,b\n1,2\n1,"2\n1,2\n', "unexpected end of data, in what begins in line 3"),
        (b"a,b,a\n1,2,3\n", "more than one column a"),
        (b"a,b\n\n", "no rows under the columns a, b"),
        (b"\n \n", "an empty file"),
        (b"a,b\n1,2\n1,\xe9\n", "the byte 0xe9 in line 3"),
        ("a,b\n1,2\n".encode("utf-16"), "iconv -f UTF-16"),
        ("a,b\n1,2\n".encode("utf-16-le"), "iconv -f UTF-16"),
        (b"PK\x03\x04\xff\xff", "a ZIP archive"),
        (b"\x1f\x8b\x08nothing", "cannot be read"),
    ],
)
def test_tables_are_refused_by_their_line(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"mine\.csv") as caught:
        read_table(tmp_path / "mine.csv")
    assert says in str(caught.value)


def test_a_folder_in_place_of_a_file(tmp_path: Path) -> None:
    for read in (read_table, read_pairs, load_ratings, load_mnist):
        name = "mine.csv" if read is load_mnist else "mine"
        (tmp_path / name).mkdir(exist_ok=True)
        with pytest.raises(DataError, match="Is a directory"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (["13", 13, 13.0, "13.0", " 13 ", "1.3e1", "+13", "013"], "13"),
        (["1000", "1e3", 1e3], "1000"),
        (["0.5", 0.5, ".5", "5e-1"], "0.5"),
        (["", None, float("nan"), "NA", "n/a", "null", "None", "?", "  "], "?"),
        ([True, "True", "true", "TRUE"], "true"),
        (["Ä", " Ä "], "Ä"),
        (["12345678901234567891", 12345678901234567891], "12345678901234567891"),
        (["1e999"], "1e999"),
        (["1_000"], "1_000"),
        (["inf", float("inf")], "inf"),
    ],
)
def test_equal_values_are_one_category(values: list[Any], wanted: str) -> None:
    assert {category(value) for value in values} == {wanted}


def test_numbers_are_finite_or_missing() -> None:
    assert [number_of(text) for text in ("1e3", " 2 ")] == [1000.0, 2.0]
    assert {number_of(text) for text in ("x", "inf", "nan", "1e999", "1_0", "\u0661")} == {None}
    assert numbers_of(["1", "x"]) is None
    found = numbers_of(["1", "", "NA"])
    assert found is not None
    assert np.isnan(found).tolist() == [False, True, True]


# mnist

PIXELS = [",".join(["0"] * 300 + [str(n)] + ["0"] * 483) for n in range(20)]


@pytest.mark.parametrize(
    "lines",
    [
        [f"{row},{n % 2}" for n, row in enumerate(PIXELS)],
        ["label," + ",".join(f"p{n}" for n in range(784))]
        + [f"{n % 2},{row}" for n, row in enumerate(PIXELS)],
        [f"{row},{n % 2}".replace(",", ";") for n, row in enumerate(PIXELS)],
        [f"{row},{n % 2}.0 ".replace(",", ", ") for n, row in enumerate(PIXELS)],
        ["\ufeff" + PIXELS[0] + ",0\r", *[f"{r},{n % 2}\r" for n, r in enumerate(PIXELS)][1:], ""],
    ],
    ids=["plain", "named", "semicolons", "fractions", "windows"],
)
def test_digits_as_people_have_them(lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("\n".join(lines), newline="")
    found = load_mnist(tmp_path / "mine.csv")
    images = np.concatenate([found["train_images"], found["test_images"]])
    labels = np.concatenate([found["train_labels"], found["test_labels"]])
    assert (images.reshape(20, 784)[:, 300] % 2 == labels).all()
    assert sorted(images.reshape(20, 784)[:, 300].tolist()) == list(range(20))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([f"{n % 2},{row}" for n, row in enumerate(PIXELS)], "the label 0 in every row"),
        ([*[f"{row},1" for row in PIXELS[:9]], PIXELS[9] + ",nan"], "nan in row 10, column 785"),
        ([*[f"{row},1" for row in PIXELS[:9]], PIXELS[9] + ",0.5"], "0.5 in row 10, column 785"),
        ([*[f"{row},1" for row in PIXELS[:9]], PIXELS[9] + ",-1"], "-1.0 in row 10, column 785"),
        ([*[f"{row},1" for row in PIXELS[:9]], PIXELS[9]], "from 785 to 784 at row 10"),
        (["a" + PIXELS[0]], "no column named label"),
    ],
)
def test_digits_that_are_refused(lines: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"mine\.csv is not a file of digits") as caught:
        load_mnist(tmp_path / "mine.csv")
    assert says in caught.value.found


@pytest.mark.parametrize("bad", ["x", None, float("nan"), 256, -1])
def test_pixels_that_are_none(bad: Any) -> None:
    with pytest.raises(DataError, match="a record is not a digit"):
        Mnist().from_record({"pixels": [0] * 783 + [bad]})


# vision


def folder_of_images(folder: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for shade, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            image.new("L", (9, 5), 100 * shade).save(folder / split / name / "0.png")
    return folder


def test_hidden_files_and_folders_do_not_count(tmp_path: Path) -> None:
    folder = folder_of_images(tmp_path)
    (folder / "train/cat/.DS_Store").write_text("x")
    (folder / "train/.ipynb_checkpoints").mkdir()
    (folder / "test/.ipynb_checkpoints").mkdir()
    images = read_images(folder, size=4)
    assert images.classes == ("cat", "dog")
    assert len(images.train_labels) == 2


def test_images_of_all_kinds(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = folder_of_images(tmp_path)
    black = {"1": 0, "L": 0, "LA": (0, 255), "RGB": (0, 0, 0), "RGBA": (0, 0, 0, 255),
             "CMYK": (0, 0, 0, 255), "P": 0}  # fmt: skip
    for mode, color in black.items():
        made = image.new(mode, (30, 20), color)
        made.save(folder / "train/cat" / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    # A black mark on nothing: without a ground, all of it would be black.
    mark = image.new("RGBA", (8, 8), (0, 0, 0, 0))
    mark.paste((0, 0, 0, 255), (0, 0, 4, 8))
    mark.save(folder / "train/dog/mark.png")
    images = read_images(folder, size=8)
    assert (images.train_images[images.train_labels == 0] == 0).all()
    row = images.train_images[images.train_labels == 1][1][0, 0].tolist()
    assert row == [0] * 4 + [255] * 4
    assert read_images(folder, size=8, color=True).train_images.shape == (10, 3, 8, 8)


def deep(folder: Path) -> None:
    pytest.importorskip("PIL.Image").new("I;16", (4, 4), 4000).save(folder / "train/cat/deep.png")


def cut(folder: Path) -> None:
    noise = np.random.RandomState(0).randint(0, 255, (64, 64), np.uint8)
    path = folder / "train/cat/cut.png"
    pytest.importorskip("PIL.Image").fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:900])


def remove(*paths: Path) -> None:
    for path in paths:
        for file in path.glob("*"):
            file.unlink()


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (deep, "deep.png is not an image that can be used"),
        (cut, "cut.png is not an image that can be used"),
        (lambda f: (f / "train/dog/a.txt").write_text("x"), "a.txt is not an image"),
        (lambda f: (f / "train/dog/more").mkdir(), "Is a directory"),
        (lambda f: remove(f / "train/dog"), "none in dog"),
        (lambda f: remove(f / "test/dog", f / "test/cat"), "none in cat, dog"),
        (lambda f: (f / "test/bird").mkdir(), "other folders: bird"),
        (lambda f: (f / "test").rename(f / "val"), "none in cat, dog"),
        (lambda f: (f / "train/dog").rename(f / "dog"), "dog, test, train, train/cat"),
    ],
)
def test_image_folders_that_are_refused(
    harm: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    folder = folder_of_images(tmp_path)
    harm(folder)
    with pytest.raises(DataError) as caught:
        read_images(folder, size=4)
    assert says in str(caught.value)


@pytest.mark.parametrize(("name", "says"), [("mine", "no such folder"), ("file", "a file")])
def test_no_folder_of_images(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="holds no images") as caught:
        read_images(tmp_path / name)
    assert caught.value.found == says


def test_a_path_that_is_none(tmp_path: Path) -> None:
    task = Vision(str(folder_of_images(tmp_path)), epochs=1, width=4)
    for path in (7, None, ["a"]):
        with pytest.raises(DataError, match="a record is not an image"):
            task.from_record({"image": path})


# translate and summarise

PAIRS = [(f"source {n}", f"Ziel {n} 中文 😀") for n in range(30)]


def test_pairs_as_people_have_them(tmp_path: Path) -> None:
    """With characters that Python's splitlines takes for the end of a line."""
    pairs = [*PAIRS, ("one\u2028two\x85three\x0bfour", "five\nsix")]
    lines = [json.dumps({"source": a, "target": b, "id": 1}, ensure_ascii=False) for a, b in pairs]
    content = ("\ufeff" + "\r\n".join(lines) + "\r\n\r\n").encode()
    (tmp_path / "mine.jsonl").write_bytes(content)
    (tmp_path / "mine.jsonl.gz").write_bytes(gzip.compress(content))
    assert read_pairs(tmp_path / "mine.jsonl") == pairs == read_pairs(tmp_path / "mine.jsonl.gz")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"source": "a"', "in line 3: Expecting"),
        ('{"source": "a"}', "no 'target' in line 3"),
        ('{"source": "a", "target": null}', "in line 3"),
        ('["a", "b"]', "in line 3"),
        ('{"source": "a", "target": "\\ud83d"}', "in line 3: 'utf-8' codec"),
        ("[" * 100_000, "in line 3"),
    ],
)
def test_pairs_are_refused_by_their_line(line: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"source": "a", "target": "b"}\n\n' + line)
    with pytest.raises(DataError, match=r"mine\.jsonl is not a file of pairs") as caught:
        read_pairs(tmp_path / "mine.jsonl")
    assert says in caught.value.found
    assert len(caught.value.found) < 300


def test_texts_of_nothing_are_left_out() -> None:
    split = split_pairs([*PAIRS, ("", "a"), ("a", " \n\t\u3000"), (" ", " ")], "mine")
    assert len(split.train) + len(split.held_out) == len(PAIRS)


@pytest.mark.parametrize("source", [None, 7, ["a"], "\ud83d"])
def test_a_record_without_a_text(source: Any) -> None:
    with pytest.raises(DataError, match="a record is not a text"):
        summarise().task.from_record({"source": source})  # type: ignore[union-attr]
