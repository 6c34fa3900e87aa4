"""The data sets' packages and formats: what is read, and what is refused by name."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from lockstep.errors import DataError
from lockstep.recipes.datasets import (
    DATA_SETS,
    adult,
    fetch,
    load_adult,
    load_fashion_mnist,
    load_ratings,
)
from lockstep.recipes.datasets.idx import from_idx, to_idx
from lockstep.recipes.datasets.images import IDX_NAMES, read_images
from lockstep.recipes.datasets.packages import DebianPackage, Wheel
from lockstep.recipes.datasets.tables import parse_table, read_table
from tests.support import command


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH: apt-get and dpkg-deb are what a test puts there."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("mkdir", "touch"):
        found = shutil.which(name, path="/usr/bin:/bin")
        assert found
        (folder / name).symlink_to(found)
    return folder


def tool(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


UNPACK = 'mkdir -p "$3/usr"; echo data > "$3/usr/data"'


def test_a_debian_package_is_downloaded_and_unpacked(tools: Path, tmp_path: Path) -> None:
    tool(tools, "apt-get", "touch stuff.deb")
    tool(tools, "dpkg-deb", UNPACK)
    (tmp_path / "temporary").mkdir()
    root = DebianPackage("stuff", "1").unpack(["usr/data"], tmp_path / "temporary")
    assert (root / "usr/data").read_text() == "data\n"


def test_where_apt_has_no_lists_it_gets_some_of_its_own(tools: Path, tmp_path: Path) -> None:
    tool(
        tools,
        "apt-get",
        f'echo "$*" >> {tmp_path}/asked\n'
        'case "$*" in *State::lists*) touch stuff.deb;; *) exit 100;; esac',
    )
    tool(tools, "dpkg-deb", UNPACK)
    (tmp_path / "temporary").mkdir()
    DebianPackage("stuff", "1").unpack(["usr/data"], tmp_path / "temporary")
    asked = [line.split()[0] for line in (tmp_path / "asked").read_text().splitlines()]
    assert asked == ["download", "update", "download"]


@pytest.mark.parametrize(
    ("apt", "dpkg", "said"),
    [
        ("echo 'E: no network' >&2; exit 100", UNPACK, "E: no network"),
        ("echo 'W: no route' >&2; echo >&2; echo 'E: nothing' >&2; exit 1", UNPACK, "no route; E"),
        ("touch stuff.deb", "echo 'not an archive' >&2; exit 2", "not an archive"),
        ("touch stuff.deb", "exit 0", "no usr/data"),
        ("touch stuff.deb", None, "no dpkg-deb"),
    ],
)
def test_a_debian_package_that_cannot_be_had(
    apt: str, dpkg: str | None, said: str, tools: Path, tmp_path: Path
) -> None:
    tool(tools, "apt-get", apt)
    if dpkg:
        tool(tools, "dpkg-deb", dpkg)
    (tmp_path / "temporary").mkdir()
    with pytest.raises(DataError, match=said) as caught:
        DebianPackage("stuff", "1").unpack(["usr/data"], tmp_path / "temporary")
    assert "apt-get download --quiet stuff" in caught.value.fix


def test_missing_data_name_their_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Wheel, "roots", lambda self: [])
    monkeypatch.setattr(DebianPackage, "roots", lambda self: [])
    for data_set in DATA_SETS:
        assert data_set.where() == "not here"
        with pytest.raises(DataError) as caught:
            data_set.read()
        assert caught.value.fix == f"lockstep data fetch {data_set.name}"


def test_data_list(tmp_path: Path) -> None:
    ended = command.lockstep("data", "list", "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert [row["name"] for row in json.loads(ended.stdout)] == [each.name for each in DATA_SETS]
    ended = command.lockstep("data", "list", cwd=tmp_path)
    assert len(ended.stdout.splitlines()) == len(DATA_SETS)


@pytest.mark.long
def test_real_data_sets_are_the_known_ones() -> None:
    """Downloads what is neither in the cache nor installed."""
    fetch("fashion-mnist")
    images = load_fashion_mnist()
    assert images.train_images.shape == (60_000, 1, 28, 28)
    assert np.bincount(images.test_labels).tolist() == [1000] * 10
    fetch("movielens-100k")
    ratings = load_ratings()
    assert (len(ratings.users), len(ratings.user_names), len(ratings.item_names)) == (
        100_000, 943, 1682,
    )  # fmt: skip
    assert "Toy Story (1995)" in ratings.item_names
    pytest.importorskip("pyarrow")
    fetch("adult")
    assert load_adult().columns["income"].count(">50K") == 11_687


def test_adult_is_unpacked_once() -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"age": [25, 38], "income": ["<=50K", ">50K, or so"]})
    parquet.write_table(table, sink, compression="brotli")
    files = adult._convert({adult.PACKED: sink.getvalue().to_pybytes()})
    assert files == {adult.TABLE: b'age,income\n25,<=50K\n38,">50K, or so"\n'}


def test_adult_without_pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"lockstep-dlp\[parquet\]"):
        adult._convert({adult.PACKED: b""})


# Formats.


def test_idx_there_and_back() -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert to_idx(array)[:16].hex() == "00000803000000020000000300000004"
    for content in (to_idx(array), gzip.compress(to_idx(array))):
        assert (from_idx(content, "x") == array).all()


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\0", to_idx(np.zeros(3, np.uint8))[:-1], b"\0\0\x0d\x01\0\0\0\0", b"\x1f\x8bnothing"],
)
def test_files_that_are_not_idx(content: bytes) -> None:
    with pytest.raises(DataError, match="mine is not an IDX file"):
        from_idx(content, "mine")


def write_idx(folder: Path, sizes: dict[str, int], labels: int = 3) -> None:
    for split, (images, names) in IDX_NAMES.items():
        pixels = np.arange(sizes[split] * 16, dtype=np.uint8).reshape(-1, 4, 4)
        (folder / f"{images}.gz").write_bytes(gzip.compress(to_idx(pixels)))
        (folder / names).write_bytes(to_idx(np.arange(sizes[split], dtype=np.uint8) % labels))


def test_idx_files_of_the_user(tmp_path: Path) -> None:
    write_idx(tmp_path, {"train": 6, "test": 4})
    images = read_images(tmp_path)
    assert images.train_images.shape == (6, 1, 4, 4)
    assert images.test_labels.tolist() == [0, 1, 2, 0]
    assert images.classes == ("0", "1", "2")


def test_idx_files_that_do_not_fit(tmp_path: Path) -> None:
    write_idx(tmp_path, {"train": 6, "test": 4})
    (tmp_path / IDX_NAMES["test"][1]).write_bytes(to_idx(np.zeros(3, np.uint8)))
    with pytest.raises(DataError, match="do not fit their labels"):
        read_images(tmp_path)


@pytest.mark.parametrize("color", [False, True])
def test_image_folder(color: bool, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 2), ("test", 1)):
        for shade, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                pixel = (100 * shade, 100 * shade, 100 * shade)
                image.new("RGB", (9, 5), pixel).save(tmp_path / split / name / f"{number}.png")
    images = read_images(tmp_path, size=6, color=color)
    assert images.train_images.shape == (4, 3 if color else 1, 6, 6)
    assert images.train_images[:, 0, 0, 0].tolist() == [0, 0, 100, 100]
    assert images.train_labels.tolist() == [0, 0, 1, 1]
    assert images.classes == ("cat", "dog")
    (tmp_path / "test/cat/readme.txt").write_text("no image")
    with pytest.raises(DataError, match=r"readme\.txt is not an image"):
        read_images(tmp_path)


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images") as caught:
        read_images(tmp_path)
    assert "train-images-idx3-ubyte" in caught.value.expected


def test_tables() -> None:
    def columns(content: bytes) -> object:
        return parse_table(content, "t").columns

    assert columns(b"a,b\n1,x\n\n2,y\n") == {"a": ["1", "2"], "b": ["x", "y"]}
    assert columns(b'a:token\tb:float\n"1\tx\n') == {"a": ['"1'], "b": ["x"]}
    assert columns(b'a, b\n"1,5", x\n') == {"a": ["1,5"], "b": ["x"]}


@pytest.mark.parametrize("content", [b"", b"a,b\n", b"a,b\n1\n", b"a,a\n1,2\n", b'a,b\n"\n,'])
def test_files_that_are_no_tables(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"mine\.csv is not a table"):
        read_table(tmp_path / "mine.csv")


def test_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_table(tmp_path / "mine.csv")


def test_ratings_are_sorted_by_user_and_time(tmp_path: Path) -> None:
    path = tmp_path / "ratings.tsv"
    path.write_text("user\titem\ttimestamp\nb\tx\t3\na\ty\t9\nb\ty\t1\na\tx\t9\n")
    ratings = load_ratings(path)
    named = [
        (ratings.user_names[user], ratings.item_names[item])
        for user, item in zip(ratings.users, ratings.items, strict=True)
    ]
    assert named == [("a", "y"), ("a", "x"), ("b", "y"), ("b", "x")]


@pytest.mark.parametrize("header", ["user,film", "person,item", "user,item,timestamp"])
def test_tables_that_are_no_ratings(header: str, tmp_path: Path) -> None:
    row = ",".join("x" for _ in header.split(","))
    (tmp_path / "mine.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(DataError, match=r"mine\.csv(, line 2)? is not a (table of ratings|rating)"):
        load_ratings(tmp_path / "mine.csv")
