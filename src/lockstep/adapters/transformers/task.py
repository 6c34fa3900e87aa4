"""Adapter `from_transformers`: a model of Hugging Face transformers, or its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.adapters.common import (
    answer_by,
    base_of,
    build_data,
    build_model,
    check_callable,
    draw_by,
    need,
)
from lockstep.adapters.transformers.columns import columns_of, lengths_of, of_transformers, taken
from lockstep.adapters.transformers.hf_datasets import check_table
from lockstep.adapters.transformers.predictions import answers
from lockstep.adapters.transformers.token_metrics import (
    label_shift,
    labels_tokens,
    token_score,
    token_sums,
)
from lockstep.errors import JobError, TaskError
from lockstep.job.loss_form import split_loss
from lockstep.job.task import Parameters, Task

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset


def from_transformers(
    model: Any,
    dataset: Any,
    *,
    eval_dataset: Any = None,
    auto_class: str | type | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
    loss: Callable[[Any, Any], Any] | None = None,
    lr: float = 5e-5,
    weight_decay: float = 0.01,
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    from_record: Callable[[Mapping[str, Any]], Any] | None = None,
    predict: Callable[[nn.Module, Any], Sequence[Mapping[str, Any]]] | None = None,
    generate: Mapping[str, Any] | None = None,
    sample_weights: Any = None,
    group_by_length: bool = False,
    length_column_name: str = "length",
) -> Task:
    """Task that fine-tunes, or trains from scratch, a transformers model with AdamW.

    The loss is the model's own mean over a shard's batch; shards are weighted by their samples.

    Args:
        model: a `PreTrainedModel`, sent to the workers with its weights; a function that builds one
            there; or a `PretrainedConfig`, from which one is initialised under the job's seed.
        dataset: a `datasets.Dataset` or any map-style data set whose items are mappings of the
            model's inputs and `labels`; or a function that builds it.
        eval_dataset: the held-out data, of the same form.
        auto_class: for a configuration, `"AutoModelForSequenceClassification"` or the class.
        collate: a data collator; default: `transformers.default_data_collator`, which does not
            pad. `DataCollatorWithPadding(tokenizer)` pads each shard to its own longest sample.
            Collators of transformers get only the columns that the model takes, as with its
            Trainer; other functions get all columns.
        loss: from `(outputs, labels)`, the mean over a batch, in place of the model's own: such as
            `transformers.trainer_pt_utils.LabelSmoother(0.1)`.
        lr: AdamW's learning rate.
        weight_decay: of parameters with two or more dimensions, so not of biases and norms.
        warmup_steps: the steps in which the learning rate rises from 0 to `lr`.
        decay_steps: the step at which it has fallen linearly to 0, usually the `steps` of the
            run; None: it does not fall.
        from_record: from a record of a file to predict from: the sample for `collate`, such as
            `lambda record: tokenizer(record["text"], truncation=True)`.
        predict: from `(model, batch)`, a mapping for each sample of the batch; default: labels and
            scores of a classification, texts of a model that generates (see `answers`).
        generate: arguments of `model.generate` for predictions: `{"max_new_tokens": 40}`.
        sample_weights: one number per sample, by which they are drawn, as `WeightedRandomSampler`
            takes them; or a function of the data set that returns them.
        group_by_length: whether samples of about the same length share a batch, as with the
            Trainer's `group_by_length`, or `train_sampling_strategy="group_by_length"`.
        length_column_name: the column that has their lengths, if there is one; without it they are
            those of `input_ids`.

    Raises:
        JobError: transformers is not installed, or an argument is of the wrong kind.
    """
    transformers = need("transformers", "transformers")
    if isinstance(model, transformers.PretrainedConfig):
        model = _FromConfig(model, _auto_class(transformers, auto_class))
    elif auto_class is not None:
        raise JobError(
            "auto_class is given, but the model is not a configuration",
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
    for name, table in (("dataset", dataset), ("eval_dataset", eval_dataset)):
        check_table(name, table)
    check_callable("collate", collate, "DataCollatorWithPadding(tokenizer)", optional=True)
    check_callable("loss", loss, "LabelSmoother(0.1)", optional=True)
    collator = collate or transformers.default_data_collator
    _check_collator(collator, evaluates=eval_dataset is not None)
    task = TransformersTask(model, dataset, eval_dataset, collator, loss, lr, weight_decay)
    task.warmup_steps, task.decay_steps = warmup_steps, decay_steps
    task.generate = dict(generate or {})
    task.length_column = length_column_name if group_by_length else None
    answer_by(task, from_record, predict)
    draw_by(task, sample_weights)
    return task


def _check_collator(collator: Any, *, evaluates: bool) -> None:
    """Refuse collators whose draws depend on the worker, or whose batches join the samples."""
    name = type(collator).__name__
    if getattr(collator, "seed", None) is not None:
        raise JobError(
            "the collator has a seed of its own, so its draws depend on which worker collates what",
            expected="seed=None: masks are then drawn under the job's seed",
            found=f"{name} with seed={collator.seed!r}",
            fix="leave it out, and give the job the seed",
        )
    if evaluates and name == "DataCollatorWithFlattening":
        raise JobError(
            "the collator joins the samples of a batch into one, and held-out samples count singly",
            expected="a collator that pads, or no eval_dataset",
            found=name,
            fix="collate=DataCollatorForLanguageModeling(tokenizer, mlm=False), for instance",
        )


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
    """Builds a model from its configuration."""

    def __init__(self, config: Any, auto_class: Any) -> None:
        self.config, self.auto_class = config, auto_class

    def __call__(self) -> nn.Module:
        model: nn.Module = self.auto_class.from_config(self.config)
        return model


class TransformersTask(Task):
    """Task made by `from_transformers`."""

    warmup_steps: int = 0
    decay_steps: int | None = None
    length_column: str | None = None
    """Where samples are grouped by length: the column that may have it."""
    generate: Mapping[str, Any]
    """Arguments of `model.generate` for predictions."""

    def __init__(
        self,
        model: Any,
        dataset: Any,
        eval_dataset: Any,
        collator: Callable[[list[Any]], Any],
        criterion: Callable[[Any, Any], Any] | None,
        lr: float,
        weight_decay: float,
    ) -> None:
        self._model, self._dataset, self._eval_dataset = model, dataset, eval_dataset
        self._collator, self._criterion = collator, criterion
        self._shift: int | None = None
        """For a model that scores tokens, the result of `label_shift` once it is known."""
        self._columns: frozenset[str] | None = None
        """The columns that the collator gets; None: all."""
        self.lr, self.weight_decay = lr, weight_decay
        self.made_from = tuple(part for part in (model, criterion) if part is not None)

    def model(self) -> nn.Module:
        model = build_model(self._model)
        if of_transformers(self._collator):
            self._columns = columns_of(model)
        return model.train()  # from_pretrained returns it in evaluation mode

    def train_data(self) -> Dataset[Any]:
        data: Dataset[Any] = build_data(self._dataset)
        return data

    def sample_lengths(self, data: Any) -> Sequence[float] | torch.Tensor | None:
        return None if self.length_column is None else lengths_of(data, self.length_column)

    def eval_data(self) -> Dataset[Any] | None:
        data: Dataset[Any] | None = build_data(self._eval_dataset)
        return data

    def collate(self, samples: list[Any]) -> Any:
        if self._columns is not None:
            samples = [taken(sample, self._columns) for sample in samples]
        return self._collator(samples)

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return self._loss(model(**batch), batch)

    def _loss(self, outputs: Any, batch: Any) -> Any:
        if self._criterion is None:
            return _own_loss(outputs, batch)
        return self._criterion(outputs, batch.get("labels"))

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """AdamW with weight decay for parameters of two or more dimensions only."""
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
        """transformers' linear schedule: up over the warm-up, then down or constant."""
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
        """Loss, and accuracy of a classification. For metrics over tokens see `score`."""
        if self._shift is not None:
            return {}
        outputs = model(**batch)
        logits, labels = getattr(outputs, "logits", None), batch.get("labels")
        if labels_tokens(base_of(model), logits, labels):
            self._shift = label_shift(model, batch)
            return {}
        loss, beside = split_loss(self._loss(outputs, batch))
        found: dict[str, torch.Tensor | float] = {"loss": loss, **beside}
        if _one_class_each(logits, labels):
            found["accuracy"] = outputs.logits.argmax(-1) == labels
        return found

    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | Sequence[Any]]:
        """The sums over the labelled tokens of each sample; see `token_sums`."""
        if self._shift is None:
            return {}
        return token_sums(model(**batch).logits, batch["labels"], self._shift)

    def score(self, outputs: dict[str, Any]) -> Mapping[str, float]:
        """Loss, perplexity and accuracy over all labelled held-out tokens, each counted once."""
        return token_score(outputs) if outputs else {}

    def predict(self, model: nn.Module, batch: Any) -> Sequence[Mapping[str, Any]]:
        """The standard predictions of the kind of model; see `answers`."""
        return answers(model, batch, getattr(self._collator, "tokenizer", None), self.generate)


def _one_class_each(logits: Any, labels: Any) -> bool:
    """Whether there are scores of several classes for each sample, and one class as its label."""
    if logits is None or labels is None or labels.ndim != 1 or labels.is_floating_point():
        return False
    return bool(logits.ndim == 2 and len(logits) == len(labels) and logits.shape[1] > 1)


def _own_loss(outputs: Any, batch: Any) -> torch.Tensor:
    """The loss that the model returned. Raises: TaskError: it returned none."""
    loss: torch.Tensor | None = getattr(outputs, "loss", None)
    if loss is None:
        fix = (
            "give each sample labels, in a column `labels` or `label`; a bare AutoModel has no "
            "head; CLIP and its like want return_loss=True in the batch, from a collate function"
        )
        raise TaskError(
            "the model returned no loss",
            expected="a batch with labels, and a model with a head that makes a loss of them",
            found=f"a batch of {', '.join(batch)}; {type(outputs).__name__}",
            fix="set return_dict=True in its configuration" if type(outputs) is tuple else fix,
        )
    return loss
