"""Images with labels, in two splits: from IDX files, as MNIST has them, or from an image folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.datasets.idx import from_idx
from lockstep.errors import DataError

IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""The files of images and labels of each split; `.gz` may follow."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images to learn from, and others held out."""

    train_images: NDArray[np.uint8]
    """`[n, channels, height, width]`, 0 to 255."""
    train_labels: NDArray[np.int64]
    """`[n]`, from 0."""
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    classes: tuple[str, ...]
    """What each label means."""


def images_of(
    contents: dict[str, bytes], classes: tuple[str, ...] = (), source: str | Path = ""
) -> Images:
    """Images out of the contents of four IDX files, by name, packed or not.

    Args:
        contents: by the names of `IDX_NAMES`, with or without `.gz`.
        classes: what the labels mean; default: their numbers.
        source: where they come from, for messages.

    Raises:
        DataError: a file is not IDX, or images and labels do not fit each other.
    """
    plain = {name.removesuffix(".gz"): content for name, content in contents.items()}
    arrays: dict[str, Any] = {}
    for split, (images_name, labels_name) in IDX_NAMES.items():
        images, labels = from_idx(plain[images_name], images_name), from_idx(
            plain[labels_name], labels_name
        )  # fmt: skip
        if images.ndim != 3 or labels.shape != images.shape[:1] or not len(labels):
            raise DataError(
                f"the {split} images of {source} do not fit their labels",
                expected="images [n, height, width] and labels [n]",
                found=f"{list(images.shape)} and {list(labels.shape)}",
                fix="look at where the files come from",
            )
        arrays[f"{split}_images"] = images[:, None]
        arrays[f"{split}_labels"] = labels.astype(np.int64)
    return _checked(arrays, classes, source)


def read_images(folder: str | Path, *, size: int = 28, color: bool = False) -> Images:
    """Images out of a folder of the user's.

    Args:
        folder: four IDX files with MNIST's names, or `train/CLASS/*` and `test/CLASS/*` with an
            image in each file, which Pillow reads.
        size: images of an image folder are scaled to `size` x `size`.
        color: keep an image folder's colours (3 channels), or make the images grey (1).

    Raises:
        DataError: the folder holds neither, or an image cannot be read.
    """
    folder = Path(folder)
    names = [name for pair in IDX_NAMES.values() for name in pair]
    found = {name: _either(folder, name) for name in names}
    if all(found.values()):
        contents = {name: path.read_bytes() for name, path in found.items() if path}
        return images_of(contents, source=folder)
    classes = tuple(sorted(path.name for path in folder.glob("train/*") if path.is_dir()))
    if not classes:
        raise DataError(
            f"{folder} holds no images that can be read",
            expected=f"the files {', '.join(names)} (or .gz), or train/CLASS/ and test/CLASS/ "
            "with an image in each file",
            found=", ".join(sorted(path.name for path in folder.glob("*"))[:8]) or "nothing",
            fix="put them there, or leave the path out",
        )
    arrays: dict[str, Any] = {}
    for split in IDX_NAMES:
        images, labels = _read_split(folder / split, classes, size, color)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels
    return _checked(arrays, classes, folder)


def _either(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _read_split(
    folder: Path, classes: tuple[str, ...], size: int, color: bool
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((folder / name).glob("*")):
            images.append(read_image(path, size, color))
            labels.append(label)
    if not images:
        raise DataError(
            f"{folder} holds no images",
            expected=f"one or more in {', '.join(classes)}",
            found="none",
            fix="train/ and test/ need folders of the same names",
        )
    return np.stack(images), np.array(labels, np.int64)


def read_image(path: Path, size: int, color: bool) -> NDArray[np.uint8]:
    """An image file, scaled to `[3 or 1, size, size]`.

    Raises:
        DataError: it cannot be read.
    """
    try:
        from PIL import Image
    except ImportError:
        raise DataError(
            "image files need Pillow",
            expected="the package Pillow",
            found="no such package",
            fix="pip install 'lockstep-dlp[images]'",
        ) from None
    try:
        with Image.open(path) as image:
            scaled = image.convert("RGB" if color else "L").resize((size, size))
    except OSError as error:
        raise DataError(
            f"{path} is not an image",
            expected="a format that Pillow reads",
            found=str(error),
            fix="leave it out",
        ) from error
    pixels = np.asarray(scaled, np.uint8)
    return pixels.transpose(2, 0, 1) if color else pixels[None]


def _checked(arrays: dict[str, Any], classes: tuple[str, ...], source: str | Path) -> Images:
    most = max(int(arrays["train_labels"].max()), int(arrays["test_labels"].max()))
    classes = classes or tuple(str(label) for label in range(most + 1))
    train, test = arrays["train_images"].shape[1:], arrays["test_images"].shape[1:]
    if most >= len(classes) or train != test:
        raise DataError(
            f"the two splits of {source} do not fit each other",
            expected=f"images {list(train)} and labels below {len(classes)}",
            found=f"images {list(test)} and a label {most}",
            fix="look at where the files come from",
        )
    return Images(**arrays, classes=classes)
