"""`lockstep predict` with the adapters' tasks: rows by the kind of model, for any workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lockstep
from lockstep.adapters.transformers.predictions import padded_left
from lockstep.api.prediction import Predicted
from lockstep.errors import TaskError
from lockstep.job.task import Task
from tests.adapters.test_module import from_blobs
from tests.adapters.test_transformers import Sentences, bart, bert, masking, pad, tokenizer
from tests.api.test_prediction import RECORDS, lines_of, points
from tests.support import command
from tests.support import reference_loop as reference
from tests.support import transformers_job as reviews
from tests.support.named_tasks import blobs

GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
SAMPLED = {**GREEDY, "do_sample": True}


def test_a_module_predicts(run_folder: str, tmp_path: Path) -> None:
    def classes(model: nn.Module, batch: torch.Tensor) -> list[dict[str, int]]:
        return [{"class": index} for index in model(batch).argmax(1).tolist()]

    task = from_blobs(from_record=lambda record: torch.tensor(record["point"]), predict=classes)
    run = lockstep.run(
        task, workers=1, shards=2, threads=1, steps=4, batch_size=16, quiet=True, out=run_folder
    )
    data = points(tmp_path / "points.jsonl")
    files = []
    for workers in (1, 3):
        out = tmp_path / f"{workers}.jsonl"
        lockstep.predict(run.folder, data, out=out, workers=workers, task=task)
        files.append(out.read_bytes())
    assert files[0] == files[1]
    with torch.no_grad():
        wanted = run.model()(blobs(RECORDS, seed=5).tensors[0]).argmax(1).tolist()
    assert [row["class"] for row in lines_of(out)] == wanted


def prompts_of(count: int, seed: int) -> list[list[int]]:
    sentences = Sentences(count, seed)
    return [sentences[index]["input_ids"] for index in range(count)]


def continuing(fails_at: int = -1) -> Task:
    """A model that continues texts, with records of several lengths."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=24, bos_token_id=2,
        eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    words = tokenizer()

    def from_record(record: Mapping[str, Any]) -> Any:
        if record["id"] == fails_at:
            raise ValueError("not this one")
        return words(record["text"])

    texts = [{"input_ids": ids} for ids in prompts_of(40, seed=1)]
    return lockstep.from_transformers(
        config, texts, auto_class="AutoModelForCausalLM", collate=masking(mlm=False),
        from_record=from_record, generate=SAMPLED,
    )  # fmt: skip


@pytest.mark.long
def test_a_model_that_generates(run_folder: str, tmp_path: Path) -> None:
    """Two workers begin the file and one goes on with it: they are the texts of transformers alone,
    with prompts padded on the left, where here the tokenizer pads on the right, and with the
    seeds of the batches."""
    task = continuing()
    settings: dict[str, Any] = {"batch_size": 4, "threads": 1, "seed": 3}
    run = lockstep.run(task, workers=1, shards=2, steps=3, quiet=True, out=run_folder, **settings)
    prompts = [" ".join(f"w{i}" for i in ids) for ids in prompts_of(75, seed=7)]
    data, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [json.dumps({"id": id, "text": text}) for id, text in enumerate(prompts)]
    data.write_text("\n".join(rows))

    def predict(task: Task, workers: int) -> Predicted:
        return lockstep.predict(
            run.folder, data, out=out, keep=["id"], batch_size=4, workers=workers, task=task
        )

    with pytest.raises(TaskError, match=r"not this one\n.*prompts\.jsonl, line 73"):
        predict(continuing(fails_at=72), 2)
    assert predict(task, 1).resumed_at == 64
    model: Any = run.model().eval()
    words, texts = tokenizer(), []
    words.padding_side = "left"
    for batch, start in enumerate(range(0, 75, 4)):
        inputs = words(prompts[start : start + 4], padding=True, return_tensors="pt")
        reference.seed_all(reference.derive(3, "predict", batch))
        tokens = model.generate(**inputs, **SAMPLED)[:, inputs["input_ids"].shape[1] :]
        texts += words.batch_decode(tokens, skip_special_tokens=True)
    assert [row["generated_text"] for row in lines_of(out)] == texts
    assert len(set(texts)) > 1


def test_padding_moves_before_the_tokens() -> None:
    ids = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 8], [0, 5, 6, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    found = padded_left({"input_ids": ids, "attention_mask": mask, "image": ids[:, :2]})
    assert found["input_ids"].tolist() == [[0, 0, 5, 6], [5, 6, 7, 8], [0, 0, 5, 6]]
    assert found["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    assert found["image"].tolist() == ids[:, :2].tolist()
    assert padded_left({"input_ids": ids})["input_ids"] is ids


def asked(make: Callable[[], nn.Module], collate: Any = pad) -> tuple[nn.Module, Any, Any]:
    """A model, a batch of two, and what is predicted of it."""
    samples = [{"input_ids": ids, "labels": 0} for ids in prompts_of(2, seed=6)]
    task = lockstep.from_transformers(make, samples, collate=collate, generate=GREEDY)
    model = task.model().eval()
    batch = task.collate([samples[0], samples[1]])
    with torch.no_grad():
        return model, batch, task.predict(model, batch)


def of_bert(kind: str, **settings: Any) -> Any:
    config = bert()
    config.update(settings)
    import transformers

    return getattr(transformers, kind)(config)


def test_a_class_or_a_number_or_all_classes() -> None:
    """As transformers' pipeline has them, by `problem_type`."""
    names = {"id2label": {0: "no", 1: "yes"}}
    kind = "BertForSequenceClassification"
    model, batch, rows = asked(lambda: of_bert(kind, **names))
    with torch.no_grad():
        logits = model(**batch).logits
    best = logits.softmax(1).max(1)
    wanted = [names["id2label"][index] for index in best.indices.tolist()]
    assert [row["label"] for row in rows] == wanted
    assert [row["score"] for row in rows] == best.values.tolist()
    every = {**names, "problem_type": "multi_label_classification"}
    _, _, rows = asked(lambda: of_bert(kind, **every))
    assert [list(row["scores"]) for row in rows] == [["no", "yes"]] * 2
    _, _, rows = asked(lambda: of_bert(kind, num_labels=1))
    assert [list(row) for row in rows] == [["score"]] * 2
    assert isinstance(rows[0]["score"], float)


def test_a_label_for_each_token() -> None:
    _, batch, rows = asked(lambda: of_bert("BertForTokenClassification"))
    for row, size in zip(rows, batch["attention_mask"].sum(1).tolist(), strict=True):
        assert len(row["labels"]) == len(row["scores"]) == size
        assert set(row["labels"]) <= {"LABEL_0", "LABEL_1"}


def test_a_choice() -> None:
    def choices(samples: list[Any]) -> Any:
        ids = torch.arange(12).view(2, 2, 3)
        return {"input_ids": ids, "labels": torch.tensor([0, 1])}

    _, _, rows = asked(lambda: of_bert("BertForMultipleChoice"), choices)
    assert {row["choice"] for row in rows} <= {0, 1}


def test_a_text_of_a_text() -> None:
    """Of an encoder and a decoder, with the tokenizer of the collator."""
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    words = tokenizer()
    collate = transformers.DataCollatorForSeq2Seq(words)

    def lists(samples: list[Any]) -> Any:
        return collate([{"input_ids": sample["input_ids"]} for sample in samples])

    lists.tokenizer = words  # type: ignore[attr-defined]
    model, batch, rows = asked(lambda: transformers.BartForConditionalGeneration(bart()), lists)
    tokens = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                            **GREEDY)  # type: ignore[operator]  # fmt: skip
    texts = words.batch_decode(tokens, skip_special_tokens=True)
    assert rows == [{"generated_text": text} for text in texts]


def test_a_mixture_of_experts_generates() -> None:
    """Without the router's part of the loss, which cannot be taken while tokens are generated."""
    torch.manual_seed(1)  # of other weights it may generate padding, which is no word
    transformers = pytest.importorskip("transformers", reason="needs the extra transformers")
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0,
        num_key_value_heads=1, intermediate_size=16, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    _, _, rows = asked(lambda: transformers.MixtralForCausalLM(config), masking(mlm=False))
    assert [len(row["generated_text"].split()) for row in rows] == [5, 5]


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("BertForMaskedLM", "BertForMaskedLM, no tokenizer"),
        ("BertLMHeadModel", "BertLMHeadModel, no tokenizer"),
    ],
)
def test_nothing_that_everybody_would_expect(kind: str, found: str) -> None:
    with pytest.raises(TaskError, match=rf"is not known\n(.*\n)*.*{found}\n.*give predict="):
        asked(lambda: of_bert(kind, is_decoder=kind == "BertLMHeadModel"))


@pytest.mark.long
def test_the_commands_with_a_function_of_a_file(tmp_path: Path) -> None:
    """Run, predict, verify and resume by `file.py:function`."""
    bert()  # skips before anything has run
    records = [json.dumps({"id": i, **row}) for i, row in enumerate(reviews.rows(20, seed=3))]
    (tmp_path / "records.jsonl").write_text("\n".join(records))

    def ran(*arguments: str) -> str:
        found = command.lockstep(*arguments, cwd=tmp_path)
        assert found.returncode == 0, found.stderr
        return found.stdout

    ran("run", f"{reviews.__file__}:job", "--workers=2", "--out=run", "--quiet")
    for workers in ("1", "2"):
        ran("predict", "run", "records.jsonl", f"--out={workers}.jsonl", "--keep=id",
            f"--workers={workers}")  # fmt: skip
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    rows = lines_of(tmp_path / "1.jsonl")
    assert [row["id"] for row in rows] == list(range(20))
    assert {row["label"] for row in rows} <= {"bad", "good"}
    assert "verified" in ran("verify", "run", "--steps=2:5", "--workers=1")
    (tmp_path / "run" / "result.json").unlink()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    ran("resume", "run", "--workers=1", "--quiet")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
