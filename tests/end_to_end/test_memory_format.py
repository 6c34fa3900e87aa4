"""The order of the elements in the weights of convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lockstep
from lockstep.errors import TaskError
from tests.support import reference_loop as reference
from tests.zoo.buffers import Images
from tests.zoo.vectors import Vectors

TASK = Images("SGD", lr=0.1)
SETTINGS: dict[str, Any] = {"steps": 6, "batch_size": 26, "seed": 3}


class Converted(Images):
    """What the setting stands for."""

    def model(self) -> nn.Module:
        model = super().model()
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def test_channels_last_is_that_of_pytorch_for_any_number_of_workers(tmp_path: Path) -> None:
    wanted = reference.train(Converted("SGD", lr=0.1), shards=4, **SETTINGS)
    for workers in (1, 3):
        result = lockstep.run(
            TASK, shards=4, workers=workers, out=str(tmp_path / str(workers)), quiet=True,
            memory_format="channels_last", **SETTINGS,
        )  # fmt: skip
        assert Path(result.folder, "model.safetensors").read_bytes() == wanted.file()
    assert all(parameter.is_contiguous() for parameter in result.model().parameters())
    lockstep.verify(result.folder, task=TASK, workers=2, quiet=True)


def test_it_is_refused_where_it_would_do_nothing(run_folder: str) -> None:
    with pytest.raises(TaskError, match="channels_last would change nothing"):
        lockstep.run(
            Vectors(), memory_format="channels_last", out=run_folder, quiet=True, **SETTINGS
        )
