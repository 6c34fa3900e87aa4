"""Task: the user's code, as a class to subclass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lockstep.errors import TaskError
from lockstep.job.loss_form import split_loss
from lockstep.job.position import Position

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset


class Task:
    """Task: the user's code. `model`, `train_data`, `loss` and `optimizer` are required.

    One instance is made per run and forked into every worker. Methods that draw random numbers
    may use torch's, Python's and NumPy's global generators, or generators of the task's or the data
    set's own: all are seeded before each call, by the job's seed and the shard or the sample, so
    the draws do not depend on the number of workers. Nothing else may be remembered from one call
    to another that changes a result: that is refused.
    """

    scheduler_interval: Literal["step", "data_epoch"] = "step"
    """When the scheduler is stepped: after every step, or after the last step of a data epoch."""
    scheduler_metric: str = "loss"
    """The held-out metric that a `ReduceLROnPlateau` waits for: it is stepped with it after each
    evaluation, whatever `scheduler_interval` says."""
    keep_modes: bool = False
    """Whether modules that `model` returns in eval mode stay so. By default `model.train()` is
    called, as plain training loops do."""
    planned_batch_size: int | None = None
    """Samples per optimizer update in this run. Set by Lockstep before it calls `scheduler`."""

    def model(self) -> nn.Module:
        """Build the model, on the CPU, freshly initialised."""
        raise NotImplementedError

    def train_data(self) -> Dataset[Any]:
        """The training set: a map-style data set (`__len__` and `__getitem__`).

        `__getitems__(indices)`, if there, fetches a batch's samples at once, as in PyTorch.
        A `TensorDataset` is indexed without touching single samples.
        """
        raise NotImplementedError

    def loader_settings(self) -> Mapping[str, Any]:
        """Settings that the task's own data loaders have, such as `batch_size`: they count where
        the job has none. Called after `train_data` and `eval_data`. Default: nothing."""
        return {}

    def sample_weights(self, data: Any) -> Sequence[float] | torch.Tensor | None:
        """Weights by which samples are drawn, for classes of unlike sizes: one number per sample of
        `data`, which is what `train_data` returned; or None, the default: each comes once.

        As with PyTorch's `WeightedRandomSampler`, a data epoch has as many samples as the data set,
        drawn with replacement, each in proportion to its weight. They need not sum to 1; what has
        the weight 0 is never drawn. A sample that is drawn again is augmented anew. Weights by
        class: `(1 / torch.bincount(labels))[labels]` draws all classes equally often.
        """
        return None

    def sample_lengths(self, data: Any) -> Sequence[float] | torch.Tensor | None:
        """Lengths of the samples of `data`, so that samples of about the same length share a batch
        and little is padded; or None, the default: the order is random.

        As with transformers' `group_by_length`: a random order is cut into megabatches of 50
        batches (fewer in a small set), each of which is sorted by length. Each sample comes once.
        """
        return None

    def eval_data(self) -> Dataset[Any] | None:
        """The held-out set, or None. It is evaluated after every data epoch, each sample once."""
        return None

    def set_position(self, position: Position) -> None:
        """Position in the run of the calls that follow, for what depends on the step or the batch,
        such as a weight that rises.

        Called before `optimizer` and `scheduler` (with the beginning of the run), and before each
        call of `loss`, `metrics`, `outputs`, `score` and `predict`. What is kept must depend on
        `position` alone, not on what was kept before: a worker computes only some of the shards.
        Default: nothing.
        """

    def loss(self, model: nn.Module, batch: Any) -> Any:
        """The mean loss over the samples of `batch`: a scalar tensor with a graph.

        Or a pair of it and a mapping of what is to be logged: `(loss, {"accuracy": hits})`. As in
        `metrics`, each value is one number per sample (a tensor of shape `[n]`, bool allowed) or
        their mean; no graph is needed. What is recorded of a step is the mean over its samples, the
        same for any number of workers: in the ledger, in `result.steps_table()`, and of the last
        step in `result.metrics`, as `train_accuracy`. The names are the same for every batch, at
        most 16; loss, norm, step, data_epoch and samples are taken.
        """
        raise NotImplementedError

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """An optimizer over `params`; `params.named()` gives names, to make groups from."""
        raise NotImplementedError

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        """A learning-rate schedule for `optimizer`, or None. A `ReduceLROnPlateau` is stepped with
        `scheduler_metric` after each evaluation, so after each data epoch."""
        return None

    def buffer_rules(self) -> Mapping[str, str]:
        """How what the shards of a step left in a buffer of the model becomes one value.

        By the buffer's name, or a pattern such as `*.queue`: `mean` (weighted by the shards'
        samples), `sum` (of the shards' changes), `max`, `min`, or `last` (what the last shard
        left). A module's class may declare the same for its own buffers, in an attribute
        `buffer_rules`. Known for torch's modules; any other buffer has to stay as it is in
        training, unless `shards` is 1. Default: nothing.
        """
        return {}

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | float]:
        """Held-out metrics of one batch, called without gradients and in eval mode.

        Each value is either one number per sample (a tensor of shape `[n]`, bool allowed) or
        one number: the mean over the batch. Both are averaged over samples, in float64, in
        the order of the data. The default is the loss, and what it returns beside.
        """
        try:
            loss, beside = split_loss(self.loss(model, batch))
            return {**beside, "loss": loss}
        except Exception as error:
            error.add_note(
                "Task.metrics is not defined: held-out data go through loss(), without gradients"
            )
            raise

    def outputs(self, model: nn.Module, batch: Any) -> Mapping[str, torch.Tensor | Sequence[Any]]:
        """What `score` needs to know of one held-out batch; default: nothing.

        Called as `metrics` is. Each value has one entry per sample: a tensor of shape `[n, ...]`
        of numbers or booleans, or a list of `n` things that JSON can hold, such as texts.
        """
        return {}

    def score(self, outputs: dict[str, Any]) -> Mapping[str, float]:
        """Metrics that are not means over samples, such as AUC or BLEU.

        Called in one worker with the `outputs` of all held-out samples, in the order of the data:
        tensors of shape `[N, ...]` (float64, int64 or bool) and lists of length N. Its values are
        reported with those of `metrics`. They are the same for any number of workers.
        """
        return {}

    def baseline(self) -> Mapping[str, float]:
        """Held-out metrics of a trivial predictor, by the names of the metrics.

        Called in one worker after the last step; reported beside the metrics. Default: nothing.
        """
        return {}

    def fitted(self) -> str:
        """What is fitted to the training data besides the parameters, as a text: a vocabulary,
        ranges, the names of classes. Default: nothing.

        Called after `model`. A run records its digest. With data that give another digest, the
        run's model is neither evaluated nor used for predictions.
        """
        return ""

    def from_record(self, record: Mapping[str, Any]) -> Any:
        """The sample of a record, for `collate`.

        A record is a row of a file to predict from, its columns by name. Those of a CSV file are
        texts.
        """
        raise TaskError(
            f"{type(self).__name__} does not say what a record is",
            expected="Task.from_record(record): the sample of a row of the file",
            fix="define it beside Task.predict; of an adapter it is an argument, from_record=",
        )

    def predict(self, model: nn.Module, batch: Any) -> Sequence[Mapping[str, Any]]:
        """Predictions for a batch: for each sample a mapping of values that JSON can hold.

        Called as `metrics` is, with what `collate` makes of samples.
        """
        raise TaskError(
            f"{type(self).__name__} does not say what it predicts",
            expected="Task.predict(model, batch): a list with a mapping for each sample",
            fix="define it, beside Task.from_record; of an adapter it is an argument, predict=",
        )

    def collate(self, samples: list[Any]) -> Any:
        """The batch of a list of samples; default: torch's `default_collate`."""
        from torch.utils.data import default_collate

        return default_collate(samples)


class Parameters(list["nn.Parameter"]):
    """The model's parameters that require gradients, in the model's order."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        self._named = list(named)
        super().__init__(parameter for _, parameter in self._named)

    def named(self) -> list[tuple[str, nn.Parameter]]:
        """`(name, parameter)` pairs, as `nn.Module.named_parameters` gives them."""
        return list(self._named)
