"""Loading a task: its model and data sets are built, and the facts for the plan collected."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from lockstep.data.dataset_digest import digest_of, text_digest
from lockstep.data.dataset_shipping import Sets, read_rule, read_sets
from lockstep.data.fetching import make_fetch
from lockstep.data.order_rules import OrderRule, rule_of
from lockstep.data.records import samples_of
from lockstep.data.user_datasets import build_sets, length_of
from lockstep.job.code_digest import code_digest
from lockstep.job.job import SETTINGS, Job
from lockstep.job.task import Task
from lockstep.job.task_resolution import resolve
from lockstep.job.task_source import TaskSource
from lockstep.optim.local_sgd import LocalSGD
from lockstep.planning.forkserver_messages import LoadTask
from lockstep.system import numerics
from lockstep.system.seeding import seed_everything
from lockstep.worker.compiled_shard import compiler
from lockstep.worker.model_checks import check_model


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A task that is ready to be set up."""

    task: Task
    """With local steps, that of the rounds."""
    model: nn.Module
    train: Dataset[Any]
    held_out: Dataset[Any] | None
    order_rule: OrderRule | None
    """What decides the order of the training set, besides the seed."""
    facts: dict[str, Any]
    """JSON-ready."""
    ships: bool
    """Whether the data sets are to be sent to other hosts."""


def load(source: TaskSource, request: LoadTask, sent: int) -> Loaded:
    """Build everything, in the order in which random numbers are drawn.

    `sent` is the descriptor of what another host has sent, if anything: the data sets, or a file
    of records, which stays open.

    Raises:
        LockstepError: it cannot be used.
    """
    own, job = resolve(source)
    recipe = {} if job is None else _settings_of(job)
    settings = json.loads(request.settings)

    def setting(name: str) -> Any:
        """What was asked for last counts."""
        return settings.get(name, recipe.get(name, getattr(_PLAIN, name)))

    seed, data = setting("seed"), setting("data")
    seed_everything(seed)
    task = own if setting("local_steps") == 1 else LocalSGD(own, setting("local_steps"))
    model = task.model()
    check_model(model)
    ships = request.networked and data == "ship" and not request.data_bytes
    rule = read_rule(sent, request.data_bytes) if _has_sets(request) else None
    train, held_out = _sets(own, task, request, sent, alone=ships)
    samples = length_of(train, "train_data")
    loaders = _loader_settings(own, {**recipe, **settings})
    if json.loads(request.records) is None and not request.data_bytes:
        shuffle = settings.get("shuffle", recipe.get("shuffle", loaders.get("shuffle", True)))
        rule = rule_of(task, train, samples, shuffle=shuffle)
    facts = {
        "settings": {**loaders, **recipe},
        "loader_settings": loaders,
        "task": type(task).__name__,
        "code": code_digest(task) if source.payload is None else source.code,
        "fitted": text_digest(task.fitted()),
        "train_samples": samples,
        "eval_samples": 0 if held_out is None else length_of(held_out, "eval_data"),
        "probe": numerics.probe(),
        "sample_order": "" if rule is None else rule.description,
        "parameters": _shapes_digest(model),
    }
    if setting("compile"):
        facts["compiler"] = compiler()
    if request.networked:  # with local data there is another one on every host
        local = data == "local"
        facts["data"] = "local" if local else digest_of(make_fetch(task, train, seed), samples)
        if rule is not None and not local:
            facts["data"] = text_digest(f"{facts['data']} {rule.description}")
    return Loaded(
        task=task, model=model, train=train, held_out=held_out, order_rule=rule, facts=facts,
        ships=ships,
    )  # fmt: skip


def _has_sets(request: LoadTask) -> bool:
    """Whether another host has sent the data sets."""
    return bool(request.data_bytes) and json.loads(request.records) is None


def _shapes_digest(model: nn.Module) -> str:
    """A digest of the names, shapes and types of a model's parameters and buffers."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    forms = [(name, tuple(t.shape), str(t.dtype), t.requires_grad) for name, t in tensors]
    return text_digest(repr(forms))


def _loader_settings(own: Task, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the task's loaders are set to. Held-out batches are as large as others where that is
    what the job says."""
    found = dict(own.loader_settings())
    if settings.get("batch_size") is not None:
        found.pop("eval_batch_size", None)
    return found


def _sets(own: Task, task: Task, request: LoadTask, sent: int, *, alone: bool) -> Sets:
    """The records of a file, what another host has sent, or what the task builds."""
    records = json.loads(request.records)
    if records is not None:
        if request.data_bytes:
            os.ftruncate(sent, request.data_bytes)  # a segment has a page at least
        samples: Any = samples_of(task, records, sent)  # indexed like any Dataset
        return samples, samples
    if request.data_bytes:
        try:
            return read_sets(sent, request.data_bytes)
        finally:
            os.close(sent)
    return build_sets(own, alone=alone)


_PLAIN = Job(task="")


def _settings_of(job: Job) -> dict[str, Any]:
    return {
        name: getattr(job, name) for name in SETTINGS if getattr(job, name) != getattr(_PLAIN, name)
    }
