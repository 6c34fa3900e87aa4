"""Real weights: MiniLM learns which description of a package belongs to which title.

Needs pip install 'lockstep-dlp[transformers]', lockstep data fetch minilm, and the same of
descriptions; then nothing is downloaded. Either python examples/minilm.py, or:
lockstep run examples/minilm.py:minilm --workers 2
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

import lockstep
from lockstep.recipes.datasets import load_synopses, minilm_folder
from lockstep.recipes.datasets.text_pairs import split_pairs

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
TITLE, DESCRIPTION = 24, 64
"""Tokens that are read."""
AMONG = 250
"""A held-out title is to find its description among so many."""

Pair = tuple[str, str]
"""A description and its title."""


class Matcher(nn.Module):
    """Embeds titles and descriptions; a title's scores are its cosines with all descriptions."""

    def __init__(self) -> None:
        super().__init__()
        logging.set_verbosity_error()  # it would tell of the pooler's weights, which are left out
        logging.disable_progress_bar()
        self.encoder = AutoModel.from_pretrained(
            minilm_folder(), local_files_only=True, use_safetensors=True, add_pooling_layer=False
        )

    def embed(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """Unit vectors `[n, 384]`, by the mean over tokens, of token ids `[n, length]`."""
        hidden = self.encoder(**tokens).last_hidden_state
        return F.normalize((hidden * tokens["attention_mask"].unsqueeze(2)).sum(1), dim=1)

    def forward(self, titles: Any, descriptions: Any, labels: torch.Tensor) -> Any:
        scores = 20 * self.embed(titles) @ self.embed(descriptions).T
        return SequenceClassifierOutput(loss=F.cross_entropy(scores, labels), logits=scores)


class Collate:
    """Makes a batch of pairs; the description of title i has index i."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
        self.tokenizer.enable_padding()

    def __call__(self, pairs: list[Pair]) -> dict[str, Any]:
        return {
            "titles": self.tokens([title for _, title in pairs], TITLE),
            "descriptions": self.tokens([description for description, _ in pairs], DESCRIPTION),
            "labels": torch.arange(len(pairs)),
        }

    def tokens(self, texts: list[str], longest: int) -> dict[str, torch.Tensor]:
        self.tokenizer.enable_truncation(longest)
        rows = self.tokenizer.encode_batch(texts)
        return {
            "input_ids": torch.tensor([row.ids for row in rows]),
            "attention_mask": torch.tensor([row.attention_mask for row in rows]),
        }


def minilm(steps: int = 150, batch_size: int = 64, pairs: int | None = None) -> lockstep.Job:
    """Fine-tune for so many steps, on the first `pairs` pairs (default: all)."""
    split = split_pairs(load_synopses()[:pairs], "synopses")
    task = lockstep.from_transformers(
        Matcher,
        split.train,
        eval_dataset=split.held_out,
        collate=Collate(),
        lr=5e-5,
        warmup_steps=steps // 10,
        decay_steps=steps,
    )
    task.baseline = partial(untuned, task)
    return lockstep.Job(
        task=task, steps=steps, batch_size=batch_size, eval_batch_size=AMONG, precision="bf16"
    )


def untuned(task: lockstep.Task) -> dict[str, float]:
    """The metrics of the weights as they are, on the same batches."""
    model, held_out, hits = task.model().eval(), task.eval_data(), 0
    with torch.no_grad():
        for start in range(0, len(held_out), AMONG):
            batch = task.collate(held_out[start : start + AMONG])
            hits += int(task.metrics(model, batch)["accuracy"].sum())
    return {"accuracy": hits / len(held_out)}


if __name__ == "__main__":
    result = lockstep.run(f"{__file__}:minilm", workers=2, shards=2, threads=1)
    print(f"as it was: {result.baseline['accuracy']:.3f} of {AMONG} found at once")
    print(f"fine-tuned: {result.metrics['accuracy']:.3f}, fingerprint {result.fingerprint[:16]}")
