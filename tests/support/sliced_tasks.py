"""Tasks whose matrices are cut into slices: by structure, by a configuration, and with dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from lockstep.job.task import Parameters, Task

SAMPLES, WIDTH, LENGTH, WORDS = 48, 64, 6, 40


class SlicedTask(Task):
    """Regression of vectors, with Adam, or with SGD."""

    def __init__(self, drop: float = 0.0, *, sgd: bool = False) -> None:
        self.drop, self.sgd = drop, sgd

    def train_data(self) -> Dataset[Any]:
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(SAMPLES, WIDTH, generator=draw)
        return TensorDataset(x, x.roll(1, 1).tanh())

    def eval_data(self) -> Dataset[Any]:
        return self.train_data()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        x, y = batch
        found: torch.Tensor = (model(x) - y).square().mean()
        return found

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        if self.sgd:
            return torch.optim.SGD(params, lr=0.05, momentum=0.9)
        return torch.optim.Adam(params, lr=1e-2)


class Mlp(SlicedTask):
    """A chain, and a layer alone. Its record is a number, for all columns."""

    def from_record(self, record: Mapping[str, Any]) -> Any:
        return torch.full((WIDTH,), float(record["x"])), torch.zeros(WIDTH)

    def predict(self, model: nn.Module, batch: Any) -> list[dict[str, float]]:
        return [{"sum": value} for value in model(batch[0]).sum(1).tolist()]

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(WIDTH, 72), nn.GELU(), nn.Dropout(self.drop), nn.Linear(72, WIDTH),
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH),
        )  # fmt: skip


class Broad(SlicedTask):
    """Two large matrices, and little else."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 4096), nn.ReLU(), nn.Linear(4096, WIDTH))


class Encoder(SlicedTask):
    """torch's own transformer encoder over an embedding."""

    def model(self) -> nn.Module:
        return _Encoder(self.drop)

    def train_data(self) -> Dataset[Any]:
        return _tokens()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        (x,) = batch
        return nn.functional.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten())


class _Encoder(nn.Module):
    def __init__(self, drop: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 72, drop, batch_first=True)
        self.table = nn.Embedding(WORDS, WIDTH)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.table.weight
        nn.init.normal_(self.table.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> Any:
        padding = torch.zeros(x.shape, dtype=torch.bool)
        padding[:, -1] = True
        return self.head(self.encoder(self.table(x), src_key_padding_mask=padding))


class Table(Encoder):
    """An embedding so large that only touched rows are kept of its gradient."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(1 << 16, WIDTH), nn.Linear(WIDTH, WORDS))


class Llama(SlicedTask):
    """A tiny Llama of transformers, cut as its configuration says."""

    def model(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=72, num_hidden_layers=1,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        )  # fmt: skip
        return LlamaForCausalLM(config)

    def train_data(self) -> Dataset[Any]:
        return _tokens()

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        (x,) = batch
        found: torch.Tensor = model(input_ids=x, labels=x).loss
        return found


class T5(Llama):
    """A tiny T5 of transformers, with dropout, whose embeddings are tied."""

    def model(self) -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(
            vocab_size=WORDS, d_model=WIDTH, d_kv=16, d_ff=72, num_layers=1, num_heads=4,
            dropout_rate=self.drop,
        )  # fmt: skip
        config.decoder_start_token_id = 0
        return T5ForConditionalGeneration(config)


class Vit(SlicedTask):
    """A tiny ViT of timm."""

    def model(self) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        model: nn.Module = VisionTransformer(
            img_size=8, patch_size=4, embed_dim=WIDTH, depth=1, num_heads=4, num_classes=WIDTH
        )
        return model

    def train_data(self) -> Dataset[Any]:
        draw = torch.Generator().manual_seed(1)
        x = torch.randn(SAMPLES, 3, 8, 8, generator=draw)
        return TensorDataset(x, x.flatten(1)[:, :WIDTH])


TASKS: dict[str, type[SlicedTask]] = {
    "mlp": Mlp, "broad": Broad, "table": Table, "encoder": Encoder,
    "llama": Llama, "t5": T5, "vit": Vit,
}  # fmt: skip
PACKAGES = {"llama": "transformers", "t5": "transformers", "vit": "timm"}


def _tokens() -> Dataset[Any]:
    draw = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randint(WORDS, (SAMPLES, LENGTH), generator=draw))
