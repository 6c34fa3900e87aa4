"""A job as a user of transformers writes it, to be run by its name: `reviews.py:job`."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import lockstep

SAYS = {"good": 1, "great": 1, "fine": 1, "bad": 0, "poor": 0, "awful": 0}
OTHERS = ("film", "book", "the", "a", "is", "was", "very")


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Short reviews, and whether they are good."""
    drawn, found = random.Random(seed), []
    for _ in range(count):
        word = drawn.choice(list(SAYS))
        text = f"the {drawn.choice(OTHERS)} is {'very ' * drawn.randrange(3)}{word}"
        found.append({"text": text, "label": SAYS[word]})
    return found


def tokenizer() -> Any:
    """A token for each word. Where there are files, it is `AutoTokenizer.from_pretrained`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *SAYS, *OTHERS))}
    split = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=split, pad_token="[PAD]", unk_token="[UNK]")


def job(lr: float = 3e-3) -> lockstep.Job:
    """Two data epochs of a small BERT, which tells good reviews from bad ones."""
    from transformers import BertConfig, DataCollatorWithPadding

    tokenize = tokenizer()

    def sample(record: Mapping[str, Any]) -> Any:
        labels = {"label": record["label"]} if "label" in record else {}
        return {**tokenize(record["text"]), **labels}

    config = BertConfig(
        vocab_size=len(tokenize), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, id2label={0: "bad", 1: "good"},
    )  # fmt: skip
    task = lockstep.from_transformers(
        config,
        [sample(row) for row in rows(256, seed=1)],
        eval_dataset=[sample(row) for row in rows(40, seed=2)],
        auto_class="AutoModelForSequenceClassification",
        collate=DataCollatorWithPadding(tokenize),
        lr=lr,
        from_record=sample,
    )
    return lockstep.Job(task=task, data_epochs=2, batch_size=16, shards=4, threads=1)
