"""Models of transformers and timm with random weights, as tasks: the planner's benchmark has them.

Nothing is fetched: configurations are made here, small enough for a step of some ten milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from lockstep.job.task import Parameters, Task

SAMPLES, LENGTH, TOKENS, CLASSES = 2048, 32, 1000, 10
WIDTH, LAYERS, HEADS = 128, 2, 4
LABELS = {number: str(number) for number in range(CLASSES)}


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(
        vocab_size=TOKENS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH, id2label=LABELS,
    ))  # fmt: skip


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    return GPT2ForSequenceClassification(GPT2Config(
        vocab_size=TOKENS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=LENGTH,
        id2label=LABELS, pad_token_id=0,
    ))  # fmt: skip


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(LlamaConfig(
        vocab_size=TOKENS, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH, max_position_embeddings=LENGTH, id2label=LABELS,
        pad_token_id=0,
    ))  # fmt: skip


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(
        image_size=32, patch_size=8, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, intermediate_size=4 * WIDTH, id2label=LABELS,
    ))  # fmt: skip


def _resnet() -> nn.Module:
    if find_spec("timm") is not None:
        import timm

        model: nn.Module = timm.create_model("resnet10t", num_classes=CLASSES)
        return model
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1],
        layer_type="basic", id2label=LABELS,
    ))  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "bert": (_bert, (LENGTH,)),
    "gpt2": (_gpt2, (LENGTH,)),
    "llama": (_llama, (LENGTH,)),
    "vit": (_vit, (3, 32, 32)),
    "resnet": (_resnet, (3, 32, 32)),
}
"""By name: what builds it, and the shape of a sample: tokens, or an image."""


class RandomModel(Task):
    """One of them, on random inputs."""

    def __init__(self, name: str) -> None:
        self.name = name

    def model(self) -> nn.Module:
        """The model, the same one each time."""
        torch.manual_seed(0)
        return MODELS[self.name][0]()

    def train_data(self) -> Dataset[Any]:
        """Inputs and labels, in memory, the same ones each time."""
        generator, shape = torch.Generator().manual_seed(1), MODELS[self.name][1]
        size = (SAMPLES, *shape)
        if len(shape) == 1:
            inputs = torch.randint(1, TOKENS, size, generator=generator)
        else:
            inputs = torch.randn(size, generator=generator)
        return TensorDataset(inputs, torch.randint(CLASSES, (SAMPLES,), generator=generator))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross-entropy."""
        inputs, labels = batch
        found = model(inputs)
        return F.cross_entropy(getattr(found, "logits", found), labels)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(params, lr=1e-4)
