"""Language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

from lockstep.job.task import Parameters
from tests.zoo.vectors import HELD_OUT, SAMPLES, By, whole


class Tokens(By):
    """Sequences of 9 tokens out of 23; the base of the language models here."""

    vocabulary, length, width = 23, 9, 16

    def train_data(self) -> Dataset[Any]:
        return TensorDataset(whole(self.vocabulary, SAMPLES, self.length))

    def eval_data(self) -> Dataset[Any] | None:
        tokens = whole(self.vocabulary, HELD_OUT, self.length, seed=6)
        return TensorDataset(tokens, torch.arange(HELD_OUT))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        tokens = batch[0]
        return functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        return {"loss": self.loss(model, batch), "once": 2.0 ** batch[1].double()}


class Recurrent(Tokens):
    """Two layers of LSTM with dropout between."""

    def model(self) -> nn.Module:
        return LanguageLSTM(self.vocabulary, self.width)


class LanguageLSTM(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, num_layers=2, dropout=0.2, batch_first=True)
        self.out = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.lstm(self.embedding(tokens))[0])
        return out


Recompute = Literal["no", "plain", "reentrant"]
"""Whether activations are computed again in the backward pass, with the same dropout. The reentrant
way runs a backward pass inside of the backward pass, so gradients arrive in several parts."""


class Attention(nn.Module):
    """A transformer encoder with dropout and a causal mask of minus infinities, passed twice."""

    mask: torch.Tensor

    def __init__(self, vocabulary: int, length: int, width: int, recompute: Recompute) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(width, vocabulary)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        length = tokens.shape[1]
        hidden = self.embedding(tokens) + self.position[:length]
        mask = self.mask[:length, :length]
        for _ in range(2):
            if self.recompute == "no":
                hidden = self.encoder(hidden, mask)
            else:
                again = self.recompute == "reentrant"
                hidden = checkpoint(self.encoder, hidden, mask, use_reentrant=again)
        out: torch.Tensor = self.out(hidden)
        return out


class Transformer(Tokens):
    """Trained in two groups: no weight decay for biases and norms."""

    def __init__(self, recompute: Recompute = "no") -> None:
        self.recompute = recompute

    def model(self) -> nn.Module:
        return Attention(self.vocabulary, self.length, self.width, self.recompute)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        decayed = [parameter for _, parameter in params.named() if parameter.ndim > 1]
        plain = [parameter for _, parameter in params.named() if parameter.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": plain, "weight_decay": 0.0, "lr": 0.02},
        ]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


class Bags(Tokens):
    """Embeddings alone: most rows get no gradient in a shard."""

    vocabulary = 200

    def model(self) -> nn.Module:
        return nn.Sequential(nn.EmbeddingBag(200, self.width), nn.Linear(self.width, 200))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch[0][:, 1:]), batch[0][:, 0])


class MaxNorm(Bags):
    """The forward pass changes the rows of the embedding that it looks up."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.EmbeddingBag(200, self.width, max_norm=1.0), nn.Linear(16, 200))


class RaggedSequences(Dataset[Any]):
    """Sequences of 3 to 7 tokens."""

    def __init__(self, samples: int, seed: int) -> None:
        self.tokens = whole(Tokens.vocabulary, samples, 7, seed=seed)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self.tokens[index, : 3 + index % 5], "index": index}


class Tied(Tokens):
    """One matrix is the embedding and the output projection. Batches are padded mappings."""

    def model(self) -> nn.Module:
        model = LanguageLSTM(self.vocabulary, self.width)
        model.out.weight = model.embedding.weight
        return model

    def train_data(self) -> Dataset[Any]:
        return RaggedSequences(SAMPLES, seed=2)

    def eval_data(self) -> Dataset[Any] | None:
        return RaggedSequences(HELD_OUT, seed=6)

    def collate(self, samples: list[Any]) -> Any:
        longest = max(len(sample["tokens"]) for sample in samples)
        padded = [
            functional.pad(sample["tokens"], (0, longest - len(sample["tokens"])))
            for sample in samples
        ]
        index = torch.tensor([sample["index"] for sample in samples])
        return {"tokens": torch.stack(padded), "index": index}

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return super().loss(model, [batch["tokens"]])

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        return {"loss": self.loss(model, batch), "once": 2.0 ** batch["index"].double()}
