"""Multi-head attention in slices of heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lockstep.slices.cut_parameter import spans_of
from lockstep.slices.exchanges import join, own_slices, spread, total
from lockstep.slices.linear import Cutting, with_bias
from lockstep.slices.slice_random import drop, slice_generators
from lockstep.slices.summing import sizes_of


class AttentionSlice(nn.Module):
    """Some of the heads: the rows of the three input projections, and the columns of the output's
    that belong to them."""

    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        heads: int,
        in_proj_weight: nn.Parameter,
        in_proj_bias: nn.Parameter | None,
        out_proj_weight: nn.Parameter,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = in_proj_weight
        self.in_proj_bias = in_proj_bias
        self.out_proj_weight = out_proj_weight

    def project(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """`[batch, length, embed]` each, to `[batch, heads, length, width]`."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            found = F.linear(query, weight, bias).chunk(3, -1)
        else:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            found = tuple(map(F.linear, (query, key, value), weight.chunk(3), biases))
        return tuple(each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in found)


class SlicedMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose heads are divided among slices. The projections of the slices'
    outputs are summed along the tree, then the bias is added."""

    slices: nn.ModuleList

    @staticmethod
    def take_over(attention: nn.MultiheadAttention, slices: int, cut: Cutting) -> None:
        """Become a plain attention's class, with slices of its parameters."""
        width, embed = attention.head_dim, attention.embed_dim
        heads = sizes_of(attention.num_heads, slices)
        spans = spans_of([count * width for count in heads])
        packed = [
            [range(span.start + at, span.stop + at) for at in (0, embed, 2 * embed)]
            for span in spans
        ]
        weights = cut(attention, "in_proj_weight", 0, packed)
        has_bias = attention.in_proj_bias is not None
        biases = cut(attention, "in_proj_bias", 0, packed) if has_bias else [None] * slices
        outs = cut(attention.out_proj, "weight", 1, [[span] for span in spans])
        attention.__class__ = SlicedMultiheadAttention
        attention.slices = nn.ModuleList(map(AttentionSlice, heads, weights, biases, outs))
        attention.out_proj.__class__ = SlicedOutProjection
        vars(attention.out_proj)["held"] = [attention.slices]
        # Neither this module nor a layer that holds it takes torch's fused path.
        attention._qkv_same_embed_dim = False

    @property
    def in_proj_weight(self) -> torch.Tensor:  # type: ignore[override]
        return _packed([part.in_proj_weight for part in self._parts])

    @property
    def in_proj_bias(self) -> torch.Tensor | None:  # type: ignore[override]
        biases = [part.in_proj_bias for part in self._parts if part.in_proj_bias is not None]
        return _packed(biases) if biases else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As that of `nn.MultiheadAttention`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch does
        batched, count = query.dim() == 3, len(self.slices)
        mask = self._mask(query, key_padding_mask, attn_mask, batched=batched)
        inputs = self._inputs(query, key, value, batched=batched)
        generators: Any = [None] * count
        if self.training and self.dropout > 0.0:
            generators = slice_generators(count)
        slices, sizes = self._parts, [part.heads for part in self._parts]
        heads = spans_of(sizes)
        sums, weights = [], []
        for index, each in zip(own_slices(count), inputs, strict=True):
            part, span, generator = slices[index], heads[index], generators[index]
            own = mask[:, span.start : span.stop] if mask is not None and mask.size(1) > 1 else mask
            found, weight = self._attend(part, each, own, generator, need_weights=need_weights)
            sums.append(F.linear(found, part.out_proj_weight))
            weights.append(weight)
        out = with_bias(total(sums, count), self.out_proj.bias)
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        shown = join([weight for weight in weights if weight is not None], sizes, 1)
        shown = shown.mean(1) if average_attn_weights else shown
        return out, shown if batched else shown.squeeze(0)

    @property
    def _parts(self) -> list[AttentionSlice]:
        return _attention_slices(self.slices)

    def _inputs(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, batched: bool
    ) -> list[tuple[torch.Tensor, ...]]:
        """Query, key and value for each slice that this process computes, `[batch, length, embed]`;
        what is one tensor stays one."""
        found: dict[int, list[torch.Tensor]] = {}
        for each in (query, key, value):
            if id(each) not in found:
                x = each if batched else each.unsqueeze(0)
                x = x.transpose(0, 1) if batched and not self.batch_first else x
                found[id(each)] = spread(x, len(self.slices))
        return list(zip(*(found[id(each)] for each in (query, key, value)), strict=True))

    def _mask(
        self,
        query: torch.Tensor,
        padding: torch.Tensor | None,
        mask: torch.Tensor | None,
        *,
        batched: bool,
    ) -> torch.Tensor | None:
        """What is added to the scores: `[batch or 1, heads or 1, length or 1, keys]`."""
        padding = F._canonical_mask(
            padding, "key_padding_mask", F._none_or_dtype(mask), "attn_mask", query.dtype
        )
        mask = F._canonical_mask(mask, "attn_mask", None, "", query.dtype, False)
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
        if padding is None:
            return mask
        padding = (padding if batched else padding.unsqueeze(0))[:, None, None]
        return padding if mask is None else mask + padding

    def _attend(
        self,
        part: AttentionSlice,
        inputs: tuple[torch.Tensor, ...],
        mask: torch.Tensor | None,
        generator: torch.Generator | None,
        *,
        need_weights: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A slice's heads side by side, `[batch, length, width]`, and what they attend to."""
        query, key, value = part.project(*inputs)
        if generator is None and not need_weights:
            found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            return found.transpose(1, 2).flatten(2), None
        scores = (query * self.head_dim**-0.5) @ key.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        if generator is not None:
            weights = drop(weights, self.dropout, generator)
        return (weights @ value).transpose(1, 2).flatten(2), weights


class SlicedOutProjection(nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The output's projection, for code that reads it: it has the bias, the slices the matrix."""

    held: list[nn.ModuleList]
    """The attention's slices, in a list so that they are not taken for modules of its own."""

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return torch.cat([part.out_proj_weight for part in _attention_slices(self.held[0])], 1)


def _attention_slices(slices: nn.ModuleList) -> list[AttentionSlice]:
    return [part for part in slices if isinstance(part, AttentionSlice)]


def _packed(slices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The plain tensor: that of all queries, then of all keys, then of all values."""
    thirds = zip(*(part.chunk(3) for part in slices), strict=True)
    return torch.cat([each for third in thirds for each in third])
