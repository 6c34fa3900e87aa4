"""The adapters: the bits of the loop that a user would write, for any number of workers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import Dataset

import lockstep
from lockstep.adapters.module import ModuleTask
from lockstep.errors import JobError, LockstepError, TaskError
from lockstep.job import Parameters, Task
from lockstep.source import code_digest
from tests import reference
from tests.tasks import Blobs, blobs

NUMBERS: dict[str, Any] = {"batch_size": 16, "steps": 9, "seed": 5, "eval_batch_size": 8}


def assert_same(
    make: Callable[[], Task],
    plain: Task,
    folder: Callable[[], str],
    among: tuple[int, ...] = (1, 2, 3),
) -> None:
    """One shard is the plain loop; three are the documented sum, whoever computes them.

    `plain` holds what a user's own loop would call, and `reference` is that loop.
    """
    settings: dict[str, Any] = {**NUMBERS, "threads": 1, "quiet": True}
    alone = lockstep.run(make(), workers=1, shards=1, out=folder(), **settings)
    wanted = reference.train_unsharded(plain, **NUMBERS)
    assert (alone.folder / "model.safetensors").read_bytes() == wanted.file()
    summed = reference.train(plain, shards=3, **NUMBERS)
    results = [
        lockstep.run(make(), workers=workers, shards=3, out=folder(), **settings)
        for workers in among
    ]
    assert len({result.fingerprint for result in results}) == 1
    for result in results:
        assert (result.folder / "model.safetensors").read_bytes() == summed.file()
        _, metrics = summed.evaluations[-1]
        assert metrics.items() <= result.metrics.items()
        assert result.metrics == results[0].metrics


# Modules.


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return scores.argmax(1) == labels


def per_sample(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(scores, labels, reduction="none")


def from_blobs(**more: Any) -> Task:
    return lockstep.from_module(
        Blobs().model,
        functools.partial(blobs, 104, seed=1),
        nn.CrossEntropyLoss(),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        eval_dataset=blobs(30, seed=2),
        scheduler=functools.partial(StepLR, step_size=2),
        metrics={"accuracy": accuracy, "exact": per_sample},
        **more,
    )


class PlainBlobs(Blobs):
    def train_data(self) -> Dataset[Any]:
        return blobs(104, seed=1)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        return StepLR(optimizer, step_size=2)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        scores = model(batch[0])
        return {
            "loss": functional.cross_entropy(scores, batch[1]),
            "accuracy": accuracy(scores, batch[1]),
            "exact": per_sample(scores, batch[1]),
        }


def test_a_module(run_folders: Callable[[], str]) -> None:
    assert_same(from_blobs, PlainBlobs(), run_folders, among=(1, 3))


def test_a_module_with_its_weights_and_a_collate(run_folders: Callable[[], str]) -> None:
    """The module that was handed over is trained, and stays as it was where it came from."""
    model = Blobs().model()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def collate(samples: list[Any]) -> Any:
        return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])

    task = lockstep.from_module(
        model, blobs(20, seed=1), functional.cross_entropy, torch.optim.SGD, collate=collate
    )
    result = lockstep.run(task, steps=1, workers=1, batch_size=20, quiet=True, out=run_folders())
    trained = result.model().state_dict()
    assert not torch.equal(trained["0.weight"], before["0.weight"])
    assert torch.allclose(trained["0.weight"], before["0.weight"], atol=0.1)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_code_is_the_users() -> None:
    """The manifest's digest tells tasks of one adapter apart by the code that they are made of."""
    one = lockstep.from_module(nn.Identity, blobs(9, seed=1), accuracy, torch.optim.SGD)
    other = lockstep.from_module(nn.Identity, blobs(9, seed=1), reference.add, torch.optim.SGD)
    assert isinstance(one, ModuleTask)
    assert code_digest(one) != code_digest(other)


# Transformers.


class Sentences(Dataset[dict[str, Any]]):
    """Token ids of 4 to 9 tokens, padded by `pad`, and whether the first is among the greatest."""

    def __init__(self, count: int, seed: int, *, language: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.sizes = torch.randint(4, 10, (count,), generator=generator).tolist()
        self.ids = torch.randint(1, 40, (count, 9), generator=generator)
        self.language = language

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self.ids[index, : self.sizes[index]].tolist()
        return {"input_ids": ids, "labels": ids if self.language else int(ids[0] > 20)}


def pad(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Each batch to its own longest sample."""
    size = max(len(sample["input_ids"]) for sample in samples)

    def filled(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([s[name] + [fill] * (size - len(s[name])) for s in samples])

    ids = filled("input_ids", 0)
    language = isinstance(samples[0]["labels"], list)
    labels = filled("labels", -100) if language else torch.tensor([s["labels"] for s in samples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def bert() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    return transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=16, num_labels=2,
    )  # fmt: skip


class PlainBert(Task):
    """What a user's own loop around a classifier would have."""

    def model(self) -> nn.Module:
        import transformers

        model: nn.Module = transformers.BertForSequenceClassification(bert())
        return model

    def train_data(self) -> Dataset[Any]:
        return Sentences(60, 1)

    def eval_data(self) -> Dataset[Any]:
        return Sentences(21, 2)

    def collate(self, samples: list[Any]) -> Any:
        return pad(samples)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        loss: torch.Tensor = model(**batch).loss
        return loss

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        named = params.named()
        decayed = [p for name, p in named if "bias" not in name and "LayerNorm" not in name]
        plain = [p for name, p in named if "bias" in name or "LayerNorm" in name]
        groups = [
            {"params": decayed, "weight_decay": 0.01},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=1e-3)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        import transformers

        return transformers.get_linear_schedule_with_warmup(optimizer, 3, 9)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        outputs = model(**batch)
        return {"loss": outputs.loss, "accuracy": outputs.logits.argmax(-1) == batch["labels"]}


def test_a_classifier(run_folders: Callable[[], str]) -> None:
    """Dropout, padding that differs among shards, warm-up and decay."""

    def make() -> Task:
        return lockstep.from_transformers(
            bert(),
            Sentences(60, 1),
            eval_dataset=Sentences(21, 2),
            auto_class="AutoModelForSequenceClassification",
            collate=pad,
            lr=1e-3,
            warmup_steps=3,
            decay_steps=9,
        )

    bert()  # skips before anything has run
    assert_same(make, PlainBert(), run_folders)


def test_columns_that_the_model_does_not_take() -> None:
    """As transformers' Trainer does: they are left out, unless the collator is the user's."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    row = {"input_ids": [1, 2, 3], "label": 1, "idx": 7, "text": "a b c"}

    def collate(**options: Any) -> Any:
        task = lockstep.from_transformers(
            bert(), [row], auto_class="AutoModelForSequenceClassification", **options
        )
        return task.model(), task.collate([row, row])

    model, batch = collate()
    assert set(batch) == {"input_ids", "labels"}
    assert model(**batch).loss.isfinite()
    assert collate(collate=transformers.DefaultDataCollator())[1].keys() == {"input_ids", "labels"}
    assert collate(collate=list)[1] == [row, row]

    class Anything(nn.Module):
        def forward(self, **batch: Any) -> None: ...

    task = lockstep.from_transformers(Anything(), [row])
    task.model()
    assert set(task.collate([row])) == {"input_ids", "labels", "idx"}


def test_gradient_checkpointing(run_folders: Callable[[], str]) -> None:
    """What is computed twice, with dropout in it, is computed as if it were computed once."""

    def make(checkpointing: bool) -> Task:
        def model() -> Any:
            import transformers

            built = transformers.BertForSequenceClassification(bert())
            if checkpointing:
                built.gradient_checkpointing_enable()
            return built

        return lockstep.from_transformers(model, Sentences(40, 1), collate=pad, lr=1e-3)

    bert()  # skips before anything has run
    results = [
        lockstep.run(
            make(checkpointing), workers=workers, shards=2, threads=1, steps=3, batch_size=16,
            quiet=True, out=run_folders(),
        )
        for checkpointing, workers in ((False, 2), (True, 1), (True, 2))
    ]  # fmt: skip
    assert len({result.fingerprint for result in results}) == 1


def test_held_out_tokens_count_once(run_folders: Callable[[], str]) -> None:
    """Loss and perplexity of a language model are over tokens, however batches are padded."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    held_out = Sentences(21, 2, language=True)
    task = lockstep.from_transformers(
        config, Sentences(40, 1, language=True), eval_dataset=held_out, collate=pad,
        auto_class=transformers.AutoModelForCausalLM,
    )  # fmt: skip
    result = lockstep.run(
        task, workers=2, shards=2, threads=1, steps=3, batch_size=16, eval_batch_size=8, quiet=True,
        out=run_folders(),
    )  # fmt: skip
    model = result.model()
    losses, hits = [], 0
    with torch.no_grad():
        for index in range(len(held_out)):  # one at a time: nothing is padded
            ids = torch.tensor([held_out[index]["input_ids"]])
            logits = model(input_ids=ids).logits[0, :-1]
            losses += functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
            hits += int((logits.argmax(-1) == ids[0, 1:]).sum())
    loss = math.fsum(losses) / len(losses)
    # Other batches are other matrix products: the last bits of each loss may differ.
    assert result.metrics["loss"] == pytest.approx(loss, rel=1e-6)
    assert result.metrics["perplexity"] == math.exp(result.metrics["loss"])
    assert result.metrics["accuracy"] == hits / len(losses)


@pytest.mark.parametrize(
    ("kind", "labels", "wanted"),
    [
        ("BertForNextSentencePrediction", {"labels": [0, 1, 1]}, {"loss", "accuracy"}),
        ("BertForQuestionAnswering", {"start_positions": [0, 1, 1], "end_positions": [2, 2, 2]},
         {"loss"}),
    ],
)  # fmt: skip
def test_accuracy_is_taken_where_a_sample_has_one_class(
    kind: str, labels: dict[str, list[int]], wanted: set[str]
) -> None:
    """Whatever the model is called, and whatever its labels are."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    task = lockstep.from_transformers(
        lambda: getattr(transformers, kind)(bert()), Sentences(9, 1), collate=pad
    )
    model = task.model().eval()
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long)}
    batch |= {name: torch.tensor(value) for name, value in labels.items()}
    found = task.metrics(model, batch)
    assert set(found) == wanted
    if "accuracy" in wanted:
        right = model(**batch).logits.argmax(1) == batch["labels"]
        assert isinstance(found["accuracy"], torch.Tensor)
        assert torch.equal(found["accuracy"], right)


# What is refused.


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (
            lambda: lockstep.from_module(nn.Identity, blobs(9, 1), "mse", torch.optim.SGD),  # type: ignore[arg-type]
            JobError,
            "loss cannot be called",
        ),
        (
            lambda: from_blobs(collate=4),
            JobError,
            "collate cannot be called",
        ),
        (
            lambda: lockstep.from_transformers(bert(), Sentences(9, 1)),
            JobError,
            "does not say which model\n?.*",
        ),
        (
            lambda: lockstep.from_transformers("bert-base-uncased", Sentences(9, 1)),
            JobError,
            "neither a model nor a configuration",
        ),
        (
            lambda: lockstep.from_transformers(
                nn.Identity, Sentences(9, 1), warmup_steps=5, decay_steps=5
            ),
            JobError,
            "ends before the warm-up",
        ),
    ],
)
def test_arguments_that_are_refused(
    make: Callable[[], Task], kind: type[LockstepError], says: str
) -> None:
    if "transformers" in make.__code__.co_names or "from_transformers" in make.__code__.co_names:
        bert()
    with pytest.raises(kind, match=says):
        make()


def test_batches_that_are_no_pairs() -> None:
    task = from_blobs()
    with pytest.raises(TaskError, match=r"not a pair.*\n.*\n.*dict of x"):
        task.loss(nn.Identity(), {"x": torch.zeros(1)})


def test_a_model_without_a_loss() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    task = lockstep.from_transformers(lambda: transformers.BertModel(bert()), Sentences(9, 1))
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(TaskError, match="the model returned no loss"):
        task.loss(task.model(), batch)


@pytest.mark.parametrize("extra", ["transformers", "lightning"])
def test_a_missing_extra(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.adapters.parts import need

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(JobError, match=rf"pip install 'lockstep-dlp\[{extra}\]'"):
        need(extra, extra)
