"""Images: labelled images in two splits, from IDX files as MNIST's, or from an image folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockstep.data.user_files import read_content
from lockstep.errors import DataError
from lockstep.recipes.datasets.idx import from_idx

IDX_NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""The files of images and labels of each split; `.gz` may follow."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images: training and held-out images, with labels."""

    train_images: NDArray[np.uint8]
    """`[n, channels, height, width]`, 0 to 255."""
    train_labels: NDArray[np.int64]
    """`[n]`, from 0."""
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    classes: tuple[str, ...]
    """The name of each label."""


def images_of(
    contents: dict[str, bytes], classes: tuple[str, ...] = (), source: str | Path = ""
) -> Images:
    """Images from the contents of four IDX files, packed by gzip or not.

    Args:
        contents: by the names of `IDX_NAMES`, with or without `.gz`.
        classes: the names of the labels; default: their numbers.
        source: their origin, for messages.

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
    """Images from a folder of the user's.

    Args:
        folder: four IDX files with MNIST's names, or `train/CLASS/*` and `test/CLASS/*` with an
            image in each file, which Pillow reads.
        size: images of an image folder are scaled to `size` x `size`.
        color: keep an image folder's colours (3 channels), or make the images grey (1).

    Files and folders whose names begin with a dot are ignored.

    Raises:
        DataError: the folder holds neither, an image cannot be read, or a class has none.
    """
    folder = Path(folder)
    names = [name for pair in IDX_NAMES.values() for name in pair]
    found = {name: _either(folder, name) for name in names}
    if all(found.values()):
        contents = {name: read_content(path) for name, path in found.items() if path}
        return images_of(contents, source=folder)
    classes = tuple(path.name for path in _seen(folder / "train") if path.is_dir())
    if len(classes) < 2:
        raise DataError(
            f"{folder} holds no images that can be read",
            expected=f"the files {', '.join(names)} (or .gz), or train/CLASS/ and test/CLASS/ "
            "of two classes or more, with an image in each file",
            found=_listed(folder),
            fix="put them there, or leave the path out",
        )
    arrays: dict[str, Any] = {}
    for split in IDX_NAMES:
        files = _files(folder, split, classes)
        images = np.stack([read_image(path, size, color) for path, _ in files])
        labels = np.array([label for _, label in files], np.int64)
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = images, labels
    return _checked(arrays, classes, folder)


def _either(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _seen(folder: Path) -> list[Path]:
    """The visible content of a folder, sorted; empty if it is not a folder."""
    return sorted(path for path in folder.glob("*") if not path.name.startswith("."))


def _listed(folder: Path) -> str:
    """The content of a folder, for messages."""
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    inside = [path for name in (".", "train") for path in _seen(folder / name)]
    return ", ".join(str(path.relative_to(folder)) for path in inside[:8]) or "an empty folder"


def _files(folder: Path, split: str, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """The image files of a split, with the number of the class of each.

    Raises:
        DataError: a class has no training images, or the split has no images.
    """
    found = {name: _seen(folder / split / name) for name in classes}
    strange = {path.name for path in _seen(folder / split) if path.is_dir()} - found.keys()
    empty = [name for name, files in found.items() if not files]
    if strange or len(empty) == len(classes) or (empty and split == "train"):
        raise DataError(
            f"the classes in {folder / split} are not those to be learned",
            expected=f"images in {', '.join(classes)}",
            found=f"other folders: {', '.join(sorted(strange))}"
            if strange
            else f"none in {', '.join(empty)}",
            fix="train/ and test/ need folders of the same names, with images in train/",
        )
    return [(path, label) for label, name in enumerate(classes) for path in found[name]]


def read_image(path: Path, size: int, color: bool) -> NDArray[np.uint8]:
    """An image file, upright, scaled to `[3 or 1, size, size]`, on a white background.

    Raises:
        DataError: it cannot be read, or has more than 8 bits for a channel.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise DataError(
            "image files need Pillow",
            expected="the package Pillow",
            found="no such package",
            fix="pip install 'lockstep-dlp[images]'",
        ) from None
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):  # their conversion clips values above 255
                raise ValueError(f"pixels of more than 8 bits (Pillow's mode {image.mode})")
            if image.has_transparency_data:
                shown = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
            scaled = image.convert("RGB" if color else "L").resize((size, size))
    except Exception as error:  # Pillow's readers raise any type for a damaged file
        raise DataError(
            f"{path} is not an image that can be used",
            expected="a format that Pillow reads, with 8 bits for a channel",
            found=str(error) or type(error).__name__,
            fix="convert it, or leave it out",
        ) from error
    pixels = np.asarray(scaled, np.uint8)
    return pixels.transpose(2, 0, 1) if color else pixels[None]


def _checked(arrays: dict[str, Any], classes: tuple[str, ...], source: str | Path) -> Images:
    most = max(int(arrays["train_labels"].max()), int(arrays["test_labels"].max()))
    classes = classes or tuple(str(label) for label in range(most + 1))
    learned = np.unique(arrays["train_labels"])
    unknown = np.setdiff1d(arrays["test_labels"], learned).tolist()
    if len(learned) < 2 or unknown:
        raise DataError(
            f"the classes of {source} cannot be learned",
            expected="two or more to learn from, and no others held out",
            found=f"labels {learned.tolist()} to learn from, and others held out: {unknown}",
            fix="look at where the files come from",
        )
    train, test = arrays["train_images"].shape[1:], arrays["test_images"].shape[1:]
    if most >= len(classes) or train != test:
        raise DataError(
            f"the two splits of {source} do not fit each other",
            expected=f"images {list(train)} and labels below {len(classes)}",
            found=f"images {list(test)} and a label {most}",
            fix="look at where the files come from",
        )
    return Images(**arrays, classes=classes)
