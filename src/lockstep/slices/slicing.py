"""Slicing: a model is cut in place, so that whoever holds one of its modules has the sliced one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lockstep.planning.memory_layout import JoinedTensor
from lockstep.slices.attention import SlicedMultiheadAttention
from lockstep.slices.chains import (
    SlicedDecoderLayer,
    SlicedEncoderLayer,
    SlicedSequential,
    chain_draws,
)
from lockstep.slices.cut_parameter import CutParameter
from lockstep.slices.cuts import Cut, feeds_forward
from lockstep.slices.linear import Cutting, SlicedColumnLinear, SlicedEmbedding, SlicedRowLinear

_TAKE_OVER: Mapping[str, Callable[..., None]] = {
    "column": SlicedColumnLinear.take_over,
    "row": SlicedRowLinear.take_over,
    "heads": SlicedMultiheadAttention.take_over,
    "width": SlicedEmbedding.take_over,
}
SLICED = (SlicedColumnLinear, SlicedRowLinear, SlicedMultiheadAttention, SlicedEmbedding)


@dataclass(frozen=True, kw_only=True, eq=False)
class Slicing:
    """What has been cut."""

    parameters: tuple[CutParameter, ...]
    joined: tuple[JoinedTensor, ...]
    """By key of the plain state dict: the slices that are its tensor."""


def slice_model(model: nn.Module, cuts: Iterable[Cut], slices: int) -> Slicing:
    """Cut a model so. Its values stay what they are; it draws no random numbers."""
    plain = [(key, id(value)) for key, value in model.state_dict(keep_vars=True).items()]
    cutting = Cutting()
    for cut in cuts:
        if cut.kind:
            _TAKE_OVER[cut.kind](model.get_submodule(cut.module), slices, cutting)
    for module in list(model.modules()):
        left = [name for name, value in module._parameters.items() if id(value) in cutting.cut]
        assert not left, f"{left} of {type(module).__name__} would no longer be tied"
        _adapt_container(module)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return Slicing(
        parameters=tuple(cutting.cut.values()),
        joined=tuple(
            cutting.cut[number].joined(key, names) for key, number in plain if number in cutting.cut
        ),
    )


def slice_numbers(model: nn.Module) -> dict[int, int]:
    """By the id of each parameter that is a slice, or part of one: which slice it is."""
    found = {}
    for module in model.modules():
        if isinstance(module, SLICED):
            for number, part in enumerate(module.slices):
                found.update(dict.fromkeys(map(id, part.parameters()), number))
    return found


def draws_by_slice(model: nn.Module) -> bool:
    """Whether slices of a model draw random numbers of their own in training."""
    return any(
        (isinstance(module, SlicedMultiheadAttention) and module.dropout > 0.0)
        or chain_draws(module)
        for module in model.modules()
    )


def _adapt_container(module: nn.Module) -> None:
    """Have a container run its chains, and keep it from torch's fused path for plain layers."""
    if isinstance(module, nn.TransformerEncoder):
        if any(isinstance(each, SLICED) for each in module.modules()):
            module.use_nested_tensor = False
        return
    if not any(isinstance(each, SLICED) for each in module.children()):
        return
    if type(module) is nn.Sequential:
        module.__class__ = SlicedSequential
    elif isinstance(module, nn.TransformerEncoderLayer):
        module.activation_relu_or_gelu = 0
        if feeds_forward(module):
            module.__class__ = SlicedEncoderLayer
    elif feeds_forward(module):
        module.__class__ = SlicedDecoderLayer
