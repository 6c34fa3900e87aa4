"""Which modules are cut, how, and why not."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lockstep.errors import JobError
from lockstep.slices.cuts import Cut, choose_cuts
from lockstep.slices.words import words_of


def cuts_of(model: nn.Module, slices: int = 2, **words: str) -> dict[str, Cut]:
    asked = {name.replace("__", "."): word for name, word in words.items()} or None
    return {cut.module: cut for cut in choose_cuts(model, slices, words_of(model, asked), {})}


def kinds(model: nn.Module, slices: int = 2, **words: str) -> dict[str, str]:
    return {name: cut.kind for name, cut in cuts_of(model, slices, **words).items()}


def test_a_chain_is_cut_by_columns_and_then_by_rows() -> None:
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 32), nn.Linear(32, 32)
    )
    found = cuts_of(model, 3)
    assert [cut.kind for cut in found.values()] == ["column", "row", "column"]
    assert found["0"].pieces == found["3"].pieces == (22, 21, 21)
    assert "chain" in found["0"].reason
    assert "chain" in found["3"].reason
    assert "alone" in found["4"].reason


@pytest.mark.parametrize("between", [nn.LayerNorm(64), nn.Softmax(-1), nn.PReLU(), nn.GLU()])
def test_what_is_not_elementwise_is_no_part_of_a_chain(between: nn.Module) -> None:
    last = nn.Linear(32 if isinstance(between, nn.GLU) else 64, 64)
    model = nn.Sequential(nn.Linear(64, 64), between, last)
    assert {cut.kind for cut in cuts_of(model).values()} == {"column"}


def test_nor_is_one_with_hooks_or_another_forward() -> None:
    for change in (
        lambda relu: relu.register_forward_hook(lambda *_: None),
        lambda relu: setattr(relu, "forward", lambda x: x.softmax(-1)),
    ):
        relu = nn.ReLU()
        change(relu)
        model = nn.Sequential(nn.Linear(64, 64), relu, nn.Linear(64, 64))
        assert list(kinds(model).values()) == ["column", "column"]


class Residual(nn.Sequential):
    def forward(self, input: torch.Tensor) -> Any:
        return input + super().forward(input)


def test_a_subclass_of_a_container_proves_nothing() -> None:
    model = Residual(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    assert list(kinds(model).values()) == ["column", "column"]


def test_transformer_layers_are_cut_by_heads_and_chains() -> None:
    for layer in (nn.TransformerEncoderLayer(64, 4, 96), nn.TransformerDecoderLayer(64, 4, 96)):
        found = kinds(layer)
        assert found["self_attn"] == "heads"
        assert (found["linear1"], found["linear2"]) == ("column", "row")
    glu = nn.TransformerEncoderLayer(64, 4, 96, activation=lambda x: x.softmax(-1))
    assert kinds(glu)["linear2"] == "column"


class OwnLinear(nn.Linear):
    pass


def _hooked() -> nn.Module:
    linear = nn.Linear(64, 64)
    linear.register_forward_pre_hook(lambda *_: None)
    return linear


def _buffered() -> nn.Module:
    linear = nn.Linear(64, 64)
    linear.register_buffer("mask", torch.ones(64, 64))
    return linear


def _weight_hook() -> nn.Module:
    linear = nn.Linear(64, 64)
    linear.weight.register_hook(lambda grad: grad)
    return linear


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (OwnLinear(64, 64), "subclass of Linear"),
        (_hooked(), "hooks"),
        (_buffered(), "buffer"),
        (_weight_hook(), "weight: it has hooks"),
        (parametrizations.weight_norm(nn.Linear(64, 64)), "not known|subclass"),
        (nn.LSTM(64, 64), "LSTM is not known"),
        (nn.Conv2d(64, 64, 1), "Conv2d is not known"),
        (nn.Embedding(10, 64, max_norm=1.0), "max_norm"),
        (nn.MultiheadAttention(64, 4, kdim=32), "widths"),
        (nn.MultiheadAttention(64, 4, add_bias_kv=True), "bias_k"),
        (nn.MultiheadAttention(64, 4, add_zero_attn=True), "add_zero_attn"),
        (nn.MultiheadAttention(64, 1), "1 heads are too few"),
        (nn.Linear(8, 8), "8 columns are too few for 2 slices of 8"),
    ],
)
def test_what_is_not_cut_has_a_reason(module: nn.Module, reason: str) -> None:
    found = list(cuts_of(nn.ModuleDict({"it": module})).values())
    assert [cut.kind for cut in found] == [""] * len(found)
    assert any(re.search(reason, cut.reason) for cut in found), found


def test_a_head_is_cut_by_rows_where_it_has_few_columns() -> None:
    assert kinds(nn.ModuleList([nn.Linear(256, 10)]), 4) == {"0": "row"}


class Tied(nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 64)
        self.other = other
        if hasattr(other, "weight"):
            other.weight = self.table.weight


def test_tied_weights_are_cut_once_the_same_way() -> None:
    assert kinds(Tied(nn.Linear(64, 64))) == {"table": "width", "other": "row"}
    found = cuts_of(Tied(OwnLinear(64, 64)))
    assert [cut.kind for cut in found.values()] == ["", ""]
    assert "other too" in found["table"].reason


def test_what_is_tied_to_what_stays_whole_stays_whole() -> None:
    """Along a row of ties, in whatever order they are found."""
    for build in (lambda: [nn.Linear(64, 64), OwnLinear(64, 64)], lambda: [nn.Linear(64, 64)]):
        others = build()
        model = Tied(others[0])
        model.bias_too = others[-1]
        others[-1].bias = others[0].bias  # a row cut's bias is whole; that of a column cut is not
        found = kinds(model)
        assert found["table"] == "width"
        assert found["other"] == "row"
    model = Tied(nn.Linear(64, 64))
    model.third = OwnLinear(64, 64)
    model.third.weight = model.table.weight
    assert set(kinds(model).values()) == {""}
    pair = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64), OwnLinear(64, 64)])
    pair[1].weight, pair[2].bias = pair[0].weight, pair[1].bias
    assert list(kinds(pair).values()) == ["", "", ""]


def test_tied_attentions_are_cut_alike() -> None:
    one, other = nn.MultiheadAttention(64, 4), nn.MultiheadAttention(64, 4)
    other.in_proj_weight, other.out_proj.weight = one.in_proj_weight, one.out_proj.weight
    assert kinds(nn.ModuleList([one, other])) == {"0": "heads", "1": "heads"}
    third = nn.MultiheadAttention(64, 8)
    third.out_proj.weight = one.out_proj.weight
    assert set(kinds(nn.ModuleList([one, other, third])).values()) == {""}


def test_a_job_that_cuts_a_tied_weight_in_two_ways_is_refused() -> None:
    with pytest.raises(JobError, match="tied weight in two ways") as caught:
        cuts_of(Tied(nn.Linear(64, 64)), table="colwise", other="colwise")
    assert "table: colwise" in caught.value.found
    assert kinds(Tied(nn.Linear(64, 64)), table="colwise") == {"table": "", "other": ""}


def test_a_jobs_words_count_alone() -> None:
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 20), nn.Linear(20, 20))
    found = cuts_of(model, 4, **{"0": "colwise", "2": "rowwise"})
    assert [cut.kind for cut in found.values()] == ["column", "row", ""]
    assert "chain" in found["2"].reason
    few = cuts_of(model, 16, **{"0": "colwise"})
    assert "12 columns are too few for 16 slices" in few["0"].reason


def test_a_models_configuration_is_followed_and_the_rest_is_automatic() -> None:
    base = nn.Module()
    base.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(64, 64), "down": OwnLinear(9, 9)})])
    base.norm = nn.ModuleDict({"q": nn.Linear(64, 64)})
    model: Any = nn.Module()
    model.base_model_prefix = "model"
    model.config = SimpleNamespace(
        base_model_tp_plan={
            "layers.*.up": "rowwise", "norm.q": "sequence_parallel", "gone.*": "colwise"
        }
    )  # fmt: skip
    model.model, model.head = base, nn.Linear(64, 64)
    found = cuts_of(model)
    assert found["model.layers.0.up"].kind == "row"
    assert found["model.layers.0.down"].kind == ""
    assert found["model.norm.q"].kind == ""
    assert found["head"].kind == "column"


def test_refused_parameters_stay_whole() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    cuts = choose_cuts(model, 2, words_of(model, None), {"2.bias": "Muon updates it as a whole"})
    assert [cut.kind for cut in cuts] == ["column", ""]
    assert "Muon" in cuts[1].reason
