"""Probes: which optimizers allow a tensor to be cut into blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lockstep.optim.probes import Kind, may_cut


@pytest.mark.parametrize(
    ("kind", "options", "cut"),
    [
        ("SGD", {"momentum": 0.9}, True),
        ("SGD", {"fused": True}, True),
        ("Adam", {}, True),
        ("AdamW", {"fused": True}, True),
        ("Adagrad", {}, True),
        ("RMSprop", {}, True),
        ("Adafactor", {}, False),
        ("Muon", {}, False),
        ("SparseAdam", {}, True),
    ],
)
def test_which_optimizers_may_cut_a_tensor(kind: str, options: dict[str, Any], cut: bool) -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)([weight], lr=0.1, **options)
    groups = [dict(group) for group in optimizer.param_groups]
    sparse = kind == "SparseAdam"
    assert may_cut(optimizer, Kind(group=0, dtype=torch.float32, sparse=sparse)) is cut
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert optimizer.param_groups[0]["params"] == [weight]
