"""Evaluation in a worker: sums, outputs and predictions of held-out batches, without learning.

Metrics that are no means over samples are computed once, by one worker, from what was gathered of
every sample (see `planning.eval_batches`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lockstep.data.fetching import AbsentSamples, Fetch
from lockstep.device.device import Device
from lockstep.errors import LockstepError, TaskError
from lockstep.job.position import Position
from lockstep.job.task import Task
from lockstep.planning.eval_batches import BatchSums, Outputs, batch_range
from lockstep.planning.sampling import describe_samples
from lockstep.state.module_state import Modes, PrivateBuffers
from lockstep.state.shared_state import SharedState
from lockstep.system.own_generators import OwnGenerators
from lockstep.system.seeding import derive, seed_everything


class Inference:
    """A model that computes without learning: with the committed parameters and buffers.

    Use it as a context manager; the model is in training mode again afterwards.
    """

    def __init__(
        self,
        task: Task,
        shared: SharedState,
        generators: OwnGenerators,
        device: Device,
        position: Position,
        seed: int,
        *,
        autocast: bool,
    ) -> None:
        """`position`: after how many steps the state is."""
        self.task, self.model, self.position, self.seed = task, shared.model, position, seed
        self._committed = shared.committed
        self._generators, self.device = generators, device
        self._buffers = PrivateBuffers(shared.model, shared.buffers)
        self._contexts = contextlib.ExitStack()
        self._autocast = autocast

    def __enter__(self) -> Inference:
        self._contexts.enter_context(torch.no_grad())
        if self._autocast:
            self._contexts.enter_context(self.device.autocast())
        self._contexts.callback(self.model.train)
        self.model.eval()
        self._modes = Modes(self.model)
        return self

    def __exit__(self, *_: object) -> None:
        self._contexts.close()

    def reset(self, purpose: str, batch: int, samples: int) -> None:
        """Be as before the first batch: what computes one may change buffers and modes."""
        seed = derive(self.seed, purpose, batch)
        self._generators.seed(seed)  # first: set_position may seed them itself
        self.task.set_position(self.position.at_batch(self.position.step, batch, samples))
        self.device.seed(seed)
        self._buffers.restore(self._committed)
        self._modes.restore()


def evaluate_batches(
    inference: Inference,
    fetch: Fetch,
    absent: AbsentSamples,
    batches: Iterable[int],
    *,
    samples: int,
    batch_size: int,
) -> Iterator[BatchSums]:
    """The sums and outputs of the given batches, over the samples that are there."""
    task, model = inference.task, inference.model
    for index in batches:
        rows = batch_range(index, samples, batch_size)
        with _named(index, rows):
            batch = inference.device.place(fetch(-1, rows))
            left = len(rows) - absent.count
            inference.reset("eval", index, left)
            sums = _sums(task.metrics(model, batch), left)
            inference.reset("outputs", index, left)
            outputs = {
                name: _listed(name, value, left)
                for name, value in task.outputs(model, batch).items()
            }
        yield {"batch": index, "samples": left, "sums": sums, "outputs": outputs}


@contextlib.contextmanager
def _named(batch: int, rows: Sequence[int]) -> Iterator[None]:
    """Name a held-out batch and its samples in an error of the user's code."""
    try:
        yield
    except BaseException as error:  # the user's code may call sys.exit()
        if not isinstance(error, LockstepError):
            listed = describe_samples(rows)
            error.add_note(f"Held-out batch {batch}; its samples (indices): {listed}")
        raise


def predict_batches(
    inference: Inference,
    fetch: Fetch,
    batches: Iterable[int],
    *,
    samples: int,
    batch_size: int,
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """For each of the given batches its number, and a row of predictions per sample."""
    for index in batches:
        rows = batch_range(index, samples, batch_size)
        batch = inference.device.place(fetch(-1, rows))
        inference.reset("predict", index, len(rows))
        yield index, _rows(inference.task.predict(inference.model, batch), len(rows))


def _rows(found: object, samples: int) -> list[dict[str, Any]]:
    """What `Task.predict` returned, if it can be written down."""
    problem = ""
    if not isinstance(found, Sequence) or not all(isinstance(row, Mapping) for row in found):
        problem = repr(type(found))
    elif len(found) != samples:
        problem = f"{len(found)} rows"
    else:
        try:
            json.dumps(found)
        except (TypeError, ValueError) as error:
            problem = str(error)
    if problem:
        raise TaskError(
            "Task.predict did not return a row for each sample",
            expected=f"a list of {samples} mappings of what JSON can hold",
            found=problem,
            fix='return, for instance, [{"label": n} for n in logits.argmax(1).tolist()]',
        )
    return [dict(row) for row in found]  # type: ignore[attr-defined]  # a sequence, as it was seen


def _sums(values: object, samples: int) -> dict[str, float]:
    if not isinstance(values, Mapping):
        raise TaskError(
            "Task.metrics did not return a mapping",
            expected="names, and for each a number or a tensor",
            found=repr(type(values)),
            fix='return, for instance, {"loss": self.loss(model, batch)}',
        )
    return {str(name): _sum(name, value, samples) for name, value in values.items()}


def _sum(name: str, value: torch.Tensor | float, samples: int) -> float:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TaskError(
            f"the metric {name!r} is not a number",
            expected=f"one number, or one per sample: shape ({samples},)",
            found=repr(value)[:200],
            fix="return each sample's value, or their mean",
        ) from None
    if tensor.numel() == 1:
        return tensor.double().item() * samples
    if tensor.ndim == 1 and len(tensor) == samples:
        return tensor.double().sum().item()
    raise TaskError(
        f"the metric {name!r} has a shape that cannot be averaged over samples",
        expected=f"one number, or one per sample: shape ({samples},)",
        found=f"shape {tuple(tensor.shape)}",
        fix="return each sample's value, or their mean",
    )


def _listed(name: str, value: Any, samples: int) -> dict[str, Any]:
    """The values of one output, ready for JSON. Floats keep their bits: JSON has all digits."""
    if isinstance(value, torch.Tensor):
        wide = value.double() if value.is_floating_point() else value
        kind, values = "tensor", wide.tolist() if wide.ndim else []
    else:
        kind, values = "list", list(value)
        try:
            json.dumps(values)
        except (TypeError, ValueError) as error:
            raise TaskError(
                f"the output {name!r} cannot be sent on",
                expected="a tensor, or a list of what JSON can hold",
                found=str(error),
                fix="turn it into numbers or texts in Task.outputs",
            ) from None
    if len(values) != samples:
        raise TaskError(
            f"the output {name!r} does not have one entry per sample",
            expected=f"{samples} of them",
            found=f"shape {tuple(value.shape)}" if kind == "tensor" else f"{len(values)}",
            fix="return the outputs of every sample of the batch, in its order",
        )
    return {"kind": kind, "values": values}


def score(task: Task, outputs: Outputs, seed: int) -> dict[str, float]:
    """`Task.score` of gathered outputs."""
    given = {
        name: _tensor(output["values"]) if output["kind"] == "tensor" else output["values"]
        for name, output in outputs.items()
    }
    seed_everything(derive(seed, "score"))
    return _plain("score", task.score(given))


def baseline(task: Task, seed: int) -> dict[str, float]:
    """`Task.baseline`, as plain numbers."""
    seed_everything(derive(seed, "baseline"))
    return _plain("baseline", task.baseline())


def _tensor(values: list[Any]) -> torch.Tensor:
    # numpy makes floats float64, where torch would make them float32.
    return torch.from_numpy(np.array(values))


def _plain(method: str, numbers: Mapping[str, Any]) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in numbers.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise TaskError(
            f"Task.{method} did not return one number per name",
            expected='a mapping such as {"auc": 0.91}',
            found=f"{numbers!r:.200}: {error}",
            fix="return plain numbers",
        ) from None
