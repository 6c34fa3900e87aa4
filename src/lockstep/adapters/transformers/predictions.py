"""Predictions: rows of `lockstep predict`, by the kind of transformers model.

Labels and scores are those of transformers' pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.adapters.common import base_of
from lockstep.errors import TaskError

if TYPE_CHECKING:
    import torch
    from torch import nn

Row = dict[str, Any]


def answers(
    model: nn.Module, batch: Mapping[str, Any], tokenizer: Any, generate: Mapping[str, Any]
) -> list[Row]:
    """A row for each sample of a batch. Labels in the batch are ignored.

    Args:
        model: in evaluation mode.
        batch: the model's inputs.
        tokenizer: decodes generated tokens; None: there is none.
        generate: arguments of `model.generate`.

    Raises:
        TaskError: this kind of model has no standard form of prediction.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    base = base_of(model)
    kind = type(base).__name__
    if "TokenClassification" in kind:
        return _token_classes(model(**inputs).logits, inputs, base.config)
    if "Classification" in kind:
        return _classes(model(**inputs).logits, base.config)
    if "MultipleChoice" in kind:
        return _choices(model(**inputs).logits)
    if tokenizer is not None and hasattr(base, "can_generate") and base.can_generate():
        return _texts(model, inputs, tokenizer, generate)
    raise TaskError(
        f"what {kind} predicts is not known",
        expected="a classification, or a model that generates text with a collator that has the "
        "tokenizer, such as DataCollatorWithPadding(tokenizer)",
        found=f"{kind}, {'no ' if tokenizer is None else 'a '}tokenizer",
        fix="give predict=, a function of (model, batch) that returns a mapping for each sample",
    )


def _classes(logits: torch.Tensor, config: Any) -> list[Row]:
    """`logits`: `[n, classes]`. One label, each label's score, or a number, by `problem_type`."""
    if config.problem_type == "regression" or logits.shape[1] == 1:
        values = logits.float().tolist()
        return [{"score": value[0] if len(value) == 1 else value} for value in values]
    names = [config.id2label[index] for index in range(logits.shape[1])]
    if config.problem_type == "multi_label_classification":
        each = logits.float().sigmoid().tolist()
        return [{"scores": dict(zip(names, row, strict=True))} for row in each]
    scores, classes = logits.float().softmax(-1).max(-1)
    found = zip(classes.tolist(), scores.tolist(), strict=True)
    return [{"label": names[index], "score": score} for index, score in found]


def _token_classes(logits: torch.Tensor, inputs: Mapping[str, Any], config: Any) -> list[Row]:
    """`logits`: `[n, tokens, classes]`. A label and a score for each token that is not padding."""
    import torch

    scores, classes = logits.float().softmax(-1).max(-1)
    mask = inputs.get("attention_mask", torch.ones_like(classes)).bool()
    return [
        {
            "labels": [config.id2label[index] for index in some[kept].tolist()],
            "scores": score[kept].tolist(),
        }
        for some, score, kept in zip(classes, scores, mask, strict=True)
    ]


def _choices(logits: torch.Tensor) -> list[Row]:
    """`logits`: `[n, choices]`."""
    scores, choices = logits.float().softmax(-1).max(-1)
    found = zip(choices.tolist(), scores.tolist(), strict=True)
    return [{"choice": choice, "score": score} for choice, score in found]


def _texts(
    model: Any, inputs: dict[str, Any], tokenizer: Any, generate: Mapping[str, Any]
) -> list[Row]:
    """Generated texts, without the prompt where the model repeats it."""
    config = base_of(model).config
    continues = not config.is_encoder_decoder
    if continues:
        inputs = padded_left(inputs)
    if getattr(config, "output_router_logits", False):
        generate = {"output_router_logits": False, **generate}  # used by the loss only
    tokens = model.generate(**inputs, **generate)
    if continues:
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    texts: Sequence[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [{"generated_text": text} for text in texts]


def padded_left(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same samples padded on the left, so that a continuation begins after the last token.

    `attention_mask`, `[n, tokens]`, marks the padding; all inputs of its shape are moved.
    """
    import torch

    mask = inputs.get("attention_mask")
    if mask is None:
        return dict(inputs)
    after = mask.long().flip(1).argmax(1)  # the number of columns after the last token
    columns = (torch.arange(mask.shape[1]) - after[:, None]) % mask.shape[1]
    return {
        name: value.gather(1, columns)
        if isinstance(value, torch.Tensor) and value.shape == mask.shape
        else value
        for name, value in inputs.items()
    }
