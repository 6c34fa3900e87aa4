"""Tables of dtypes: which can be stored, and which of them stay constant in training."""

from __future__ import annotations

import torch

CONSTANT = (
    torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e4m3fnuz,
    torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
)  # fmt: skip
"""Types that PyTorch stores but hardly computes with: buffers of these must not change."""


STORED = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, *CONSTANT,
)  # fmt: skip
"""The types that safetensors has."""
