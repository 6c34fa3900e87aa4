"""Fashion-MNIST: 70,000 grey images of clothes, from a Debian package.

Xiao, Rasul and Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
Algorithms", 2017.
"""

from __future__ import annotations

from lockstep.recipes.datasets.fetching import DataSet
from lockstep.recipes.datasets.images import Images, images_of
from lockstep.recipes.datasets.packages import DebianPackage

_FOLDER = "usr/share/datasets/fashion-mnist"
FASHION_MNIST = DataSet(
    name="fashion-mnist",
    about="clothes: 60,000 and 10,000 grey images of 28 x 28",
    licence="MIT",
    package=DebianPackage("dataset-fashion-mnist", "0.0~git20200523.55506a9-1"),
    members={
        f"{_FOLDER}/train-images-idx3-ubyte.gz": (
            "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7"
        ),
        f"{_FOLDER}/train-labels-idx1-ubyte.gz": (
            "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056"
        ),
        f"{_FOLDER}/t10k-images-idx3-ubyte.gz": (
            "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa"
        ),
        f"{_FOLDER}/t10k-labels-idx1-ubyte.gz": (
            "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"
        ),
    },
)
CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
           "bag", "ankle boot")  # fmt: skip


def load_fashion_mnist() -> Images:
    """The images, in the authors' split.

    Raises:
        DataError: they have not been fetched.
        IntegrityError: they have been altered.
    """
    return images_of(FASHION_MNIST.read(), CLASSES, FASHION_MNIST.name)
