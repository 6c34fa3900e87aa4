"""What slices compute: the plain module's results within rounding, in one fixed order."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lockstep.planning.memory_layout import JoinedTensor
from lockstep.slices.chains import SlicedSequential, chain_draws
from lockstep.slices.cuts import choose_cuts
from lockstep.slices.linear import SlicedColumnLinear
from lockstep.slices.slicing import Slicing, draws_by_slice, slice_model
from lockstep.slices.summing import fan_out, sizes_of, tree_sum
from lockstep.slices.words import words_of

WIDTH, BATCH, LENGTH = 64, 3, 5


def sliced(model: nn.Module, slices: int) -> tuple[Any, Slicing]:
    """A sliced copy; the model stays plain."""
    found = copy.deepcopy(model)
    return found, slice_model(found, choose_cuts(found, slices, words_of(found, None), {}), slices)


def join(joined: JoinedTensor, tensors: dict[str, Any]) -> torch.Tensor:
    pieces = [
        tensors[each.entry].narrow(joined.dim, each.start, each.stop - each.start)
        for each in joined.pieces
    ]
    return torch.cat(pieces, joined.dim)


def check(model: nn.Module, slices: int, call: Callable[[Any], torch.Tensor]) -> Any:
    """Values to the byte, outputs and gradients within rounding."""
    other, slicing = sliced(model, slices)
    assert slicing.joined
    wanted, found = call(model), call(other)
    torch.testing.assert_close(found, wanted)
    wanted.square().mean().backward()
    found.square().mean().backward()
    parameters = dict(other.named_parameters())
    plain: dict[str, Any] = model.state_dict(keep_vars=True)
    for joined in slicing.joined:
        assert torch.equal(join(joined, parameters), plain[joined.key])
        grads = {name: parameter.grad for name, parameter in parameters.items()}
        if plain[joined.key].grad is None:
            assert all(grads[each.entry] is None for each in joined.pieces)
        else:
            torch.testing.assert_close(join(joined, grads), plain[joined.key].grad)
    assert sum(p.numel() for p in parameters.values()) == sum(p.numel() for p in model.parameters())
    return other


@pytest.mark.parametrize("slices", [2, 3, 4, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_alone_and_in_a_chain(slices: int, bias: bool) -> None:
    x = torch.randn(BATCH, LENGTH, 20)
    model: Any = nn.Sequential(
        nn.Linear(20, 70, bias), nn.Tanh(), nn.Linear(70, WIDTH, bias),
        nn.Softmax(-1), nn.Linear(WIDTH, 90, bias), nn.Softmax(-1), nn.Linear(90, 3, bias),
    )  # fmt: skip
    other = check(model, slices, lambda each: each(x))
    assert torch.equal(other[0].weight, model[0].weight)
    assert (other[0].bias is None) is not bias
    assert type(other) is SlicedSequential


def test_a_part_of_a_sequential_is_still_right() -> None:
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    other, _ = sliced(model, 2)
    x = torch.randn(BATCH, WIDTH)
    torch.testing.assert_close(other[:2](x), model[:2](x))
    torch.testing.assert_close(other[2](other[0](x)), model[2](model[0](x)))


def test_a_hook_that_comes_later_is_called() -> None:
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    other, _ = sliced(model, 2)
    seen = []
    other[0].register_forward_hook(lambda _, __, out: seen.append(out.shape))
    other(torch.randn(BATCH, WIDTH))
    assert seen == [(BATCH, WIDTH)]


@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings(sparse: bool) -> None:
    model: Any = nn.Sequential(nn.Embedding(9, 70, padding_idx=1, sparse=sparse), nn.ReLU())
    indices = torch.tensor([[1, 2], [3, 3]])
    other, slicing = sliced(model, 4)
    assert torch.equal(other(indices), model(indices))
    for each in (other, model):
        each(indices).square().mean().backward()
    grads = {name: each.grad.to_dense() for name, each in other.named_parameters()}
    assert torch.equal(join(slicing.joined[0], grads), model[0].weight.grad.to_dense())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.table(x))
        return found


def test_tied_weights_share_their_slices() -> None:
    other = check(Tied(), 3, lambda each: each(torch.arange(9)))
    assert other.head.slices[0].weight is other.table.slices[0].weight


SELF = ("self", "causal", "padding", "both", "per head", "unbatched")


@pytest.mark.parametrize("what", [*SELF, "cross", "keys"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention(what: str, need_weights: bool, batch_first: bool) -> None:
    model: Any = nn.MultiheadAttention(WIDTH, 4, batch_first=batch_first, bias=what != "cross")
    query = torch.randn(BATCH, LENGTH, WIDTH)
    key = torch.randn(BATCH, LENGTH + 1, WIDTH)
    options: dict[str, Any] = {"need_weights": need_weights}
    if what in ("causal", "both"):
        options["attn_mask"] = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        options["is_causal"] = what == "causal"
    if what == "per head":
        options["attn_mask"] = torch.randn(BATCH * 4, LENGTH, LENGTH)
        options["average_attn_weights"] = False
    if what in ("padding", "both"):
        options["key_padding_mask"] = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        options["key_padding_mask"][1, 3:] = True
    if what == "unbatched":
        query = query[0]
    elif not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    others = {"cross": (key, key), "keys": (key, key * 2)}.get(what, (query, query))
    weights = []

    def call(module: Any) -> Any:
        found, weight = module(query, *others, **options)
        weights.append(weight)
        return found

    other = check(model, 3, call)
    torch.testing.assert_close(weights[1], weights[0])
    for name in ("in_proj_weight", "out_proj.weight", "out_proj.bias"):
        plain, joined = (operator.attrgetter(name)(each) for each in (model, other))
        assert joined is plain if plain is None else torch.equal(joined, plain)
    other.eval(), model.eval()
    with torch.no_grad():
        torch.testing.assert_close(call(other), call(model))


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_transformer(norm_first: bool) -> None:
    model: Any = nn.Transformer(
        WIDTH, 4, 1, 1, 72, 0.0, "gelu", batch_first=True, norm_first=norm_first
    )
    source, target = torch.randn(BATCH, 4, WIDTH), torch.randn(BATCH, LENGTH, WIDTH)
    other = check(model, 3, lambda each: each(source, target))
    other.eval(), model.eval()
    padding = torch.zeros(BATCH, 4, dtype=torch.bool)
    padding[0, 3:] = True
    with torch.no_grad():
        found, wanted = (
            each.encoder(source, src_key_padding_mask=padding)[~padding] for each in (other, model)
        )
    torch.testing.assert_close(found, wanted)


def test_gradients_are_summed_along_the_tree() -> None:
    """To the byte, for any number of slices, and whatever else uses the tensor."""
    for slices in range(2, 9):
        x = torch.randn(100, requires_grad=True)
        factors = [torch.randn(100) * 10**index for index in range(slices)]
        products = [
            (part * factor).sum() for part, factor in zip(fan_out(x, slices), factors, strict=True)
        ]
        (tree_sum(products) + (x * 3).sum()).backward()
        assert x.grad is not None
        assert torch.equal(x.grad, tree_sum(factors) + 3)


def test_a_sum_is_the_same_whoever_makes_parts_of_it() -> None:
    parts = [torch.randn(50) * 10**index for index in range(4)]
    assert torch.equal(tree_sum(parts), tree_sum(parts[:2]) + tree_sum(parts[2:]))
    assert sizes_of(10, 4) == tuple(len(each) for each in torch.arange(10).tensor_split(4))


def test_dropout_in_a_chain_draws_by_slice() -> None:
    """What a slice drops depends on the shard's seed and the slice; the rest draws as it did."""
    model: Any = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight.zero_(), model[0].bias.fill_(1.0)
        model[2].weight.copy_(torch.arange(64.0).exp2().expand(8, 64)[:, :64] % 7)
    other, _ = sliced(model, 2)
    assert draws_by_slice(other)
    assert not draws_by_slice(model)
    x = torch.ones(BATCH, 8)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append((other(x), torch.rand(3)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])
    other.eval()
    state = torch.get_rng_state()
    torch.testing.assert_close(other(x), model.eval()(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpointed_chain_draws_the_same_again() -> None:
    from torch.utils.checkpoint import checkpoint

    model: Any = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 8))
    other, _ = sliced(model, 2)
    x = torch.randn(BATCH, 8)
    grads = []
    for run in (other, lambda value: checkpoint(other, value, use_reentrant=False)):
        torch.manual_seed(3)
        other.zero_grad()
        run(x).square().mean().backward()
        grads.append([p.grad.clone() for p in other.parameters() if p.grad is not None])
    assert all(map(torch.equal, *grads))


def test_slices_are_kept_where_a_module_is_held_twice() -> None:
    """Modules become sliced ones, so a list of them beside the model has these."""
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    beside = [model[0]]
    slice_model(model, choose_cuts(model, 2, words_of(model, None), {}), 2)
    assert type(beside[0]) is SlicedColumnLinear
    assert not chain_draws(beside[0])


def test_a_penalty_on_a_weight_has_gradients() -> None:
    model: Any = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    other, slicing = sliced(model, 3)
    for each in (model, other):
        each[0].weight.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in other.named_parameters()}
    assert torch.equal(join(slicing.joined[0], grads), model[0].weight.grad)


def test_half_precision_stays_half() -> None:
    model: Any = nn.Sequential(nn.Linear(WIDTH, 10), nn.Identity())
    other, _ = sliced(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = other(torch.randn(BATCH, WIDTH))
    assert found.dtype is torch.bfloat16
    assert F.mse_loss(found, found).item() == 0.0
