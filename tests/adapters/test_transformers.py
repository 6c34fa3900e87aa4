"""`from_transformers`: transformers models beside plain loops, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

import lockstep
from lockstep.data.order_rules import rule_of
from lockstep.errors import JobError, TaskError
from lockstep.job.task import Parameters, Task
from tests.adapters.test_module import assert_same


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


def tokenizer() -> Any:
    """Words `w4` to `w39` are tokens 4 to 39; those before are special ones."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"pad_token": "<0>", "unk_token": "<1>", "bos_token": "<2>", "eos_token": "<3>"}
    numbers = {word: index for index, word in enumerate(special.values())}
    numbers |= {f"w{index}": index for index in range(4, 40)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="<1>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, mask_token="<1>", **special)


def masking(**options: Any) -> Any:
    import transformers

    return transformers.DataCollatorForLanguageModeling(tokenizer(), **options)


def flattening() -> Any:
    import transformers

    return transformers.DataCollatorWithFlattening()


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


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a b", "label": 1}, "no column of the data is an input\n?.*"),
        ({"input_ids": [1, 2], "label": "good"}, "the column label has texts"),
    ],
)
def test_columns_that_cannot_be_used(row: dict[str, Any], says: str) -> None:
    task = lockstep.from_transformers(
        bert(), [row], auto_class="AutoModelForSequenceClassification"
    )
    task.model()
    with pytest.raises(TaskError, match=says):
        task.collate([row])


@pytest.mark.long
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


def bart() -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    return transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
        max_position_embeddings=24, bos_token_id=2, eos_token_id=3, decoder_start_token_id=2,
        forced_eos_token_id=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["BartForConditionalGeneration", "BartForCausalLM", "BertForMaskedLM"]
)
def test_tokens_are_scored_as_the_model_scores_them(kind: str) -> None:
    """Whether labels are shifted is found by asking the model: these three do not shift them, and
    their names do not tell. Batches of any size give the same sums."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    config = bart() if kind.startswith("Bart") else bert()
    held_out = Sentences(12, 2, language=True)
    task = lockstep.from_transformers(
        lambda: getattr(transformers, kind)(config), held_out, collate=pad
    )
    model = task.model().eval()

    def scored(size: int) -> Any:
        found: list[Any] = []
        for start in range(0, 12, size):
            batch = task.collate([held_out[index] for index in range(start, start + size)])
            assert task.metrics(model, batch) == {}
            found.append(task.outputs(model, batch))
        return task.score({name: torch.cat([part[name] for part in found]) for name in found[0]})

    with torch.no_grad():
        # Of all at once the model's own loss is the mean over tokens.
        own = float(model(**task.collate(list(held_out))).loss)  # type: ignore[call-overload]
        for size in (12, 1, 4):
            assert scored(size)["loss"] == pytest.approx(own, rel=1e-5)


def test_a_loss_of_ones_own() -> None:
    """As the Trainer's label smoothing is put in."""
    bert()  # skips before anything has run
    from transformers.trainer_pt_utils import LabelSmoother

    task = lockstep.from_transformers(
        bert(), Sentences(9, 1), auto_class="AutoModelForSequenceClassification", collate=pad,
        loss=LabelSmoother(0.1),
    )  # fmt: skip
    model = task.model().eval()
    batch = task.collate([Sentences(9, 1)[index] for index in range(9)])
    with torch.no_grad():
        logits = model(**batch).logits
        wanted = functional.cross_entropy(logits, batch["labels"], label_smoothing=0.1)
        found = task.loss(model, batch)
        assert float(found) == pytest.approx(float(wanted), rel=1e-5)
        assert task.metrics(model, batch)["loss"] == found


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
    ("make", "says"),
    [
        (
            lambda: lockstep.from_transformers(bert(), Sentences(9, 1)),
            "does not say which model\n?.*",
        ),
        (
            lambda: lockstep.from_transformers("bert-base-uncased", Sentences(9, 1)),
            "neither a model nor a configuration",
        ),
        (
            lambda: lockstep.from_transformers(
                nn.Identity, Sentences(9, 1), warmup_steps=5, decay_steps=5
            ),
            "ends before the warm-up",
        ),
        (
            lambda: lockstep.from_transformers(nn.Identity, "imdb"),
            "dataset is a name, not a data set",
        ),
        (
            lambda: lockstep.from_transformers(nn.Identity, Sentences(9, 1), from_record="text"),  # type: ignore[arg-type]
            "from_record cannot be called",
        ),
        (
            lambda: lockstep.from_transformers(
                nn.Identity, Sentences(9, 1), collate=masking(seed=3)
            ),
            "a seed of its own",
        ),
        (
            lambda: lockstep.from_transformers(
                nn.Identity, Sentences(9, 1), eval_dataset=Sentences(9, 2), collate=flattening()
            ),
            "held-out samples count singly",
        ),
    ],
)
def test_arguments_that_are_refused(make: Callable[[], Task], says: str) -> None:
    bert()
    with pytest.raises(JobError, match=says):
        make()


def test_a_model_without_a_loss() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    task = lockstep.from_transformers(lambda: transformers.BertModel(bert()), Sentences(9, 1))
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    with pytest.raises(TaskError, match="the model returned no loss"):
        task.loss(task.model(), batch)


class Named(Sentences):
    """Tells each sample's length in a column."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "words": 100 - self.sizes[index]}


def test_grouped_by_length(tmp_path: Path) -> None:
    """The order of the Trainer's `group_by_length`, on any number of workers."""
    trainer = pytest.importorskip("transformers.trainer_pt_utils", reason="needs transformers")
    data = Sentences(64, 1)
    task = lockstep.from_transformers(
        bert(), data, collate=pad, auto_class="AutoModelForSequenceClassification",
        group_by_length=True,
    )  # fmt: skip
    lengths = task.sample_lengths(data)
    assert lengths == data.sizes
    rule = rule_of(task, data, 64, shuffle=True)
    assert rule is not None
    drawn = [torch.Generator().manual_seed(4) for _ in range(2)]
    wanted = trainer.get_length_grouped_indices(lengths, 8, generator=drawn[0])
    assert rule.draw(drawn[1], 8).tolist() == wanted
    settings: dict[str, Any] = {"shards": 2, "batch_size": 8, "steps": 4, "quiet": True}
    runs = [lockstep.run(task, workers=n, out=tmp_path / str(n), **settings) for n in (1, 2)]
    assert runs[0].fingerprint == runs[1].fingerprint
    named = lockstep.from_transformers(
        bert(), Named(64, 1), auto_class="AutoModelForSequenceClassification",
        group_by_length=True, length_column_name="words",
    )  # fmt: skip
    assert named.sample_lengths(Named(64, 1)) == [100 - size for size in data.sizes]
    plain = lockstep.from_transformers(
        bert(), data, auto_class="AutoModelForSequenceClassification"
    )
    assert plain.sample_lengths(data) is None


def test_samples_without_a_length_are_refused() -> None:
    task = lockstep.from_transformers(
        bert(), [{"pixels": 1}], auto_class="AutoModelForSequenceClassification",
        group_by_length=True,
    )  # fmt: skip
    with pytest.raises(TaskError, match=r"grouped by length(.|\n)*pixels"):
        task.sample_lengths([{"pixels": 1}])
