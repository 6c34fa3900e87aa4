"""Token metrics: held-out loss, perplexity and accuracy over labelled tokens, each counted once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

IGNORED = -100
"""The label of a token that is not counted, as in transformers."""
MOST_EXPONENT = 700.0
"""The largest loss whose perplexity fits a float."""


def labels_tokens(model: nn.Module, logits: Any, labels: Any) -> bool:
    """Whether there are scores of several classes for each token, and one class as its label."""
    if logits is None or labels is None or type(model).__name__.endswith("ForCTC"):
        return False  # CTC's labels are not aligned with its scores
    tokens = logits.ndim == 3 and labels.ndim == 2 and logits.shape[:2] == labels.shape
    return bool(tokens and not labels.is_floating_point() and logits.shape[2] > 1)


def label_shift(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """1 if label `t` belongs to the scores at `t - 1`, as in next-token prediction; otherwise 0.

    The class name does not decide it: `BartForCausalLM` does not shift, `GPT2LMHeadModel` does.
    The model's own loss does: where labels are shifted, the first token's label is ignored.
    """
    import torch

    losses = []
    for label in (0, 1):
        labels = torch.full_like(batch["labels"], IGNORED)
        labels[:, 0] = label
        losses.append(model(**{**batch, "labels": labels}).loss)
    return int(torch.equal(losses[0].nan_to_num(), losses[1].nan_to_num()))


def token_sums(logits: torch.Tensor, labels: torch.Tensor, shift: int) -> dict[str, torch.Tensor]:
    """Sums over the labelled tokens of each sample, and their number.

    Args:
        logits: scores, `[n, tokens, classes]`.
        labels: classes or `IGNORED`, `[n, tokens]`.
        shift: 1 if labels belong to the scores before them.

    Returns:
        `losses` (float64), `hits` and `tokens` (int64), each `[n]`.
    """
    from torch.nn import functional

    logits, labels = logits[:, : logits.shape[1] - shift], labels[:, shift:]
    scores = logits.float().transpose(1, 2)
    losses = functional.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")
    counted = labels != IGNORED
    hits = (logits.argmax(-1) == labels) & counted
    return {"losses": losses.double().sum(1), "hits": hits.sum(1), "tokens": counted.sum(1)}


def token_score(sums: Mapping[str, Any]) -> dict[str, float]:
    """Loss, perplexity and accuracy over all tokens of these sums."""
    tokens = max(int(sums["tokens"].sum()), 1)
    loss = float(sums["losses"].sum()) / tokens
    perplexity = math.exp(loss) if loss < MOST_EXPONENT else math.inf
    accuracy = int(sums["hits"].sum()) / tokens
    return {"loss": loss, "perplexity": perplexity, "accuracy": accuracy}
