"""Allocation: the strides with which tensors are stored."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.state.allocation import contiguous_stride, dense_stride


@given(st.permutations(range(4)), st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_dense_strides_are_kept(axes: list[int], shape: list[int]) -> None:
    """Any permutation of a row-major tensor addresses each of its elements once."""
    tensor = torch.zeros(shape).permute(axes)
    stride = dense_stride(tensor)
    flat = torch.arange(tensor.numel()).as_strided(tensor.shape, stride)
    assert sorted(flat.flatten().tolist()) == list(range(tensor.numel()))
    used = [
        (own, kept)
        for own, kept, n in zip(tensor.stride(), stride, tensor.shape, strict=True)
        if n > 1
    ]
    assert all(own == kept for own, kept in used)


def test_strides_with_gaps_become_row_major() -> None:
    assert dense_stride(torch.zeros(4, 6)[:, ::2]) == (3, 1)
    assert dense_stride(torch.zeros(3).expand(4, 3)) == (3, 1)
    assert contiguous_stride((2, 0, 3)) == (3, 3, 1)
