"""`from_transformers`: a model of Hugging Face transformers, or a configuration of one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.adapters.parts import build_data, build_model, need
from lockstep.errors import JobError, TaskError
from lockstep.job import Parameters, Task

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

IGNORED = -100
"""The label of a token that counts nowhere, as in transformers."""
SHIFTED = ("ForCausalLM", "LMHeadModel")
"""Models of these names predict the next token: label `t` belongs to the scores at `t - 1`."""
PER_TOKEN = ("ForMaskedLM", "ForTokenClassification")
LABELS = frozenset({"label", "label_ids", "labels"})
"""Columns that collators make labels of."""


def from_transformers(
    model: Any,
    dataset: Any,
    *,
    eval_dataset: Any = None,
    auto_class: str | type | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    lr: float = 5e-5,
    weight_decay: float = 0.01,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
) -> Task:
    """Fine-tune, or train from scratch, a transformers model with AdamW.

    The loss is `model(**batch).loss`, the mean that the model itself takes over a shard's batch;
    shards are weighted by their samples.

    Args:
        model: a `PreTrainedModel`, sent to the workers with its weights; a function that makes one
            there; or a `PretrainedConfig`, from which one is initialised under the job's seed.
        dataset: a `datasets.Dataset` or any map-style data set whose items are mappings with what
            the model takes, `labels` among it; or a function that makes it.
        eval_dataset: the held-out data, of the same form.
        auto_class: for a configuration, `"AutoModelForSequenceClassification"` or the class.
        collate: a data collator; default: `transformers.default_data_collator`, which does not
            pad. `DataCollatorWithPadding(tokenizer)` pads each shard to its own longest sample.
            To collators of transformers columns that the model does not take are not given, as
            by its Trainer; a function of one's own gets the samples whole.
        lr: AdamW's learning rate.
        weight_decay: of what has two dimensions or more: not of biases and norms.
        warmup_steps: over so many steps the rate rises from 0 to `lr`.
        decay_steps: at this step it has come down to 0, in a line; None: it stays. Give the
            `steps` of the run.

    Raises:
        JobError: transformers is not installed, or an argument is of the wrong kind.
    """
    transformers = need("transformers", "transformers")
    if isinstance(model, transformers.PretrainedConfig):
        model = _FromConfig(model, _auto_class(transformers, auto_class))
    elif auto_class is not None:
        raise JobError(
            "auto_class is given, but the model is no configuration",
            expected="a PretrainedConfig with auto_class, or a model without",
            found=repr(type(model)),
            fix="leave out auto_class",
        )
    elif isinstance(model, str) or not callable(model):
        raise JobError(
            "the model is neither a model nor a configuration",
            expected="a PreTrainedModel, a PretrainedConfig or a function that makes a model",
            found=repr(model)[:200],
            fix="give AutoModelForSequenceClassification.from_pretrained(...), for instance",
        )
    if decay_steps is not None and not warmup_steps < decay_steps:
        raise JobError(
            "the schedule ends before the warm-up does",
            expected=f"decay_steps above warmup_steps = {warmup_steps}",
            found=f"decay_steps = {decay_steps}",
            fix="give decay_steps the steps of the run",
        )
    collator = collate or transformers.default_data_collator
    task = TransformersTask(model, dataset, eval_dataset, collator, lr, weight_decay)
    task.warmup_steps, task.decay_steps = warmup_steps, decay_steps
    return task


def _auto_class(transformers: Any, auto_class: str | type | None) -> Any:
    found = getattr(transformers, auto_class, None) if isinstance(auto_class, str) else auto_class
    if hasattr(found, "from_config"):
        return found
    raise JobError(
        "a configuration does not say which model is made from it",
        expected='auto_class="AutoModelForSequenceClassification", or another Auto class',
        found=repr(auto_class),
        fix="give auto_class, or the model itself",
    )


class _FromConfig:
    """Makes a model from its configuration."""

    def __init__(self, config: Any, auto_class: Any) -> None:
        self.config, self.auto_class = config, auto_class

    def __call__(self) -> nn.Module:
        model: nn.Module = self.auto_class.from_config(self.config)
        return model


class TransformersTask(Task):
    """A transformers model and its data as a task. Made by `from_transformers`."""

    warmup_steps: int = 0
    decay_steps: int | None = None

    def __init__(
        self,
        model: Any,
        dataset: Any,
        eval_dataset: Any,
        collator: Callable[[list[Any]], Any],
        lr: float,
        weight_decay: float,
    ) -> None:
        self._model, self._dataset, self._eval_dataset = model, dataset, eval_dataset
        self._collator = collator
        self._columns: frozenset[str] | None = None
        """Those that the collator gets; None: all."""
        self.lr, self.weight_decay = lr, weight_decay
        self.made_from = (model,)

    def model(self) -> nn.Module:
        model = build_model(self._model)
        if _of_transformers(self._collator):
            self._columns = _columns(model)
        return model.train()  # from_pretrained leaves it in evaluation mode

    def train_data(self) -> Dataset[Any]:
        data: Dataset[Any] = build_data(self._dataset)
        return data

    def eval_data(self) -> Dataset[Any] | None:
        data: Dataset[Any] | None = build_data(self._eval_dataset)
        return data

    def collate(self, samples: list[Any]) -> Any:
        if self._columns is not None:
            samples = [
                {name: value for name, value in sample.items() if name in self._columns}
                for sample in samples
            ]
        return self._collator(samples)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return _loss(model(**batch), batch)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """AdamW in two groups, as everybody's fine-tuning has it."""
        import torch

        decayed = [p for p in params if p.ndim > 1]
        plain = [p for p in params if p.ndim <= 1]
        groups = [
            {"params": members, "weight_decay": decay}
            for members, decay in ((decayed, self.weight_decay), (plain, 0.0))
            if members
        ]
        return torch.optim.AdamW(groups, lr=self.lr)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        """Linear, as transformers' own: up over the warm-up, then down."""
        transformers = need("transformers", "transformers")
        schedule: LRScheduler
        if self.decay_steps is not None:
            schedule = transformers.get_linear_schedule_with_warmup(
                optimizer, self.warmup_steps, self.decay_steps
            )
        else:
            schedule = transformers.get_constant_schedule_with_warmup(optimizer, self.warmup_steps)
        return schedule

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        """Loss, and accuracy of a classification. What is taken over tokens: see `score`."""
        if _per_token(model):
            return {}
        outputs = model(**batch)
        found: dict[str, torch.Tensor | float] = {"loss": _loss(outputs, batch)}
        if _one_class_each(outputs, batch):
            found["accuracy"] = outputs.logits.argmax(-1) == batch["labels"]
        return found

    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | Sequence[Any]]:
        """Of each sample, the sums over its labelled tokens, and how many there are."""
        if not _per_token(model):
            return {}
        from torch.nn import functional

        logits, labels = model(**batch).logits, batch["labels"]
        if type(model).__name__.endswith(SHIFTED):
            logits, labels = logits[:, :-1], labels[:, 1:]
        scores = logits.float().transpose(1, 2)
        losses = functional.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="none")
        counted = labels != IGNORED
        hits = (logits.argmax(-1) == labels) & counted
        return {"losses": losses.double().sum(1), "hits": hits.sum(1), "tokens": counted.sum(1)}

    def score(self, outputs: dict[str, Any]) -> Mapping[str, float]:
        """Loss, perplexity and accuracy over all labelled held-out tokens, each counted once."""
        if not outputs:
            return {}
        tokens = max(int(outputs["tokens"].sum()), 1)
        loss = float(outputs["losses"].sum()) / tokens
        perplexity = math.exp(loss) if loss < MOST_EXPONENT else math.inf
        accuracy = int(outputs["hits"].sum()) / tokens
        return {"loss": loss, "perplexity": perplexity, "accuracy": accuracy}


def _of_transformers(collator: Callable[[list[Any]], Any]) -> bool:
    """Whether it is a collator of transformers, not one of the user's."""
    kind = collator if inspect.isfunction(collator) else type(collator)
    return kind.__module__.partition(".")[0] == "transformers"


def _columns(model: nn.Module) -> frozenset[str] | None:
    """The columns that a model takes; None: it may take any."""
    transformers = need("transformers", "transformers")
    parameters = inspect.signature(model.forward).parameters.values()
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if anything and not isinstance(model, transformers.PreTrainedModel):
        return None  # what transformers' own models have there are options of attention
    return frozenset(parameter.name for parameter in parameters) | LABELS


MOST_EXPONENT = 700.0
"""The largest loss whose perplexity is a float."""


def _per_token(model: nn.Module) -> bool:
    return type(model).__name__.endswith((*SHIFTED, *PER_TOKEN))


def _one_class_each(outputs: Any, batch: Any) -> bool:
    """Whether there are scores of several classes for each sample, and one class as its label."""
    logits, labels = getattr(outputs, "logits", None), batch.get("labels")
    if logits is None or labels is None or labels.ndim != 1 or labels.is_floating_point():
        return False
    return bool(logits.ndim == 2 and len(logits) == len(labels) and logits.shape[1] > 1)


def _loss(outputs: Any, batch: Any) -> torch.Tensor:
    """Raises: TaskError: the model gave none."""
    loss: torch.Tensor | None = getattr(outputs, "loss", None)
    if loss is None:
        raise TaskError(
            "the model returned no loss",
            expected="a batch with labels, and a model with a head that makes a loss of them",
            found=f"a batch of {', '.join(batch)}; {type(outputs).__name__}",
            fix="add labels to each sample; a bare AutoModel has no head",
        )
    return loss
