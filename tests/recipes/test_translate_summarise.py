"""The recipes translate and summarise, on small files that the tests make themselves."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lockstep
from lockstep import recipes
from lockstep.errors import DataError, JobError
from lockstep.job.faults import Fault
from lockstep.job.job import Job
from lockstep.recipes.datasets import fetch
from lockstep.recipes.text.rewriting import Rewriting
from lockstep.recipes.translate import compare, translate
from tests.support.harmed_runs import assert_same, assert_struck

NAMES = ("translate", "summarise")
WORDS = {
    "small": "kleine", "large": "große", "old": "alte", "tool": "Sache", "library": "Bibliothek",
    "window": "Oberfläche", "editor": "Feder", "server": "Zentrale", "game": "Spielerei",
}  # fmt: skip


def pairs(folder: Path) -> Path:
    """108 sentences of three words that change, each with a translation that is nearly shorter."""
    rows = ["source\ttarget"]
    first, last = list(WORDS)[:3], list(WORDS)[3:]
    for a, b, c in itertools.product(first, last, last):
        rows.append(f"the {a} {b} for the {c} x{len(rows)}\t{WORDS[a]} {WORDS[b]} für {WORDS[c]}")
    (folder / "pairs.tsv").write_text("\n".join(rows) + "\n")
    return folder / "pairs.tsv"


def job(name: str, folder: Path, **settings: Any) -> Job:
    """The recipe on a small file, for 6 steps."""
    recipe = recipes.find(name)
    made = recipe(str(pairs(folder)), epochs=2, width=16, vocabulary=300)
    return made.replace(batch_size=33, eval_batch_size=4, shards=3, threads=1, **settings)


def held_out(task: lockstep.Task | str) -> tuple[list[str], list[str]]:
    assert isinstance(task, Rewriting)
    sources, targets = zip(*task.split.held_out, strict=True)
    return list(sources), list(targets)


@pytest.mark.parametrize("name", ["summarise", pytest.param("translate", marks=pytest.mark.long)])
def test_the_same_bits(name: str, tmp_path: Path) -> None:
    """On one worker, on two, and on three of which one is killed."""
    made = job(name, tmp_path, precision="bf16" if name == "translate" else "fp32")
    whole = lockstep.run(made, workers=1, out=str(tmp_path / "1"), quiet=True)
    two = lockstep.run(made, workers=2, out=str(tmp_path / "2"), quiet=True)
    assert_same(two, whole)
    faults = (Fault(worker_id=1, step=3, phase="backward"),)
    harmed = lockstep.run(made, workers=3, out=str(tmp_path / "3"), quiet=True, faults=faults)
    assert_struck(harmed.folder, faults)
    assert_same(harmed, whole)
    assert harmed.baseline == two.baseline == whole.baseline
    assert whole.baseline.keys() < whole.metrics.keys()
    if made.precision == "fp32":
        sources, _ = held_out(made.task)
        assert isinstance(made.task, Rewriting)
        model = whole.model()
        batches = [sources[start : start + 4] for start in range(0, len(sources), 4)]
        texts = [answer["text"] for batch in batches for answer in made.task.predict(model, batch)]
        assert made.task.score({"texts": texts}).items() <= whole.metrics.items()


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_a_mean_over_pairs(name: str, tmp_path: Path) -> None:
    """So that shards weighted by their samples give the loss of the whole batch."""
    task = job(name, tmp_path).task
    assert isinstance(task, Rewriting)
    torch.manual_seed(0)
    model, data = task.model().eval(), task.train_data()

    def loss(first: int, last: int) -> float:
        return task.loss(model, task.collate(data.__getitems__(list(range(first, last))))).item()

    assert (loss(0, 10) * 10 + loss(10, 15) * 5) / 15 == pytest.approx(loss(0, 15), rel=1e-5)


def test_the_rate_rises_and_falls_to_nothing(tmp_path: Path) -> None:
    task = translate(str(pairs(tmp_path)), epochs=50, width=16, vocabulary=300).task
    assert isinstance(task, Rewriting)
    optimizer = task.optimizer(lockstep.Parameters(task.model().named_parameters()))
    schedule = task.scheduler(optimizer)
    rates = []
    for _ in range(105):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == rates[9] == task.settings.rate
    assert rates[0] == pytest.approx(task.settings.rate / 10)
    assert rates[99:] == [0.0] * 6


def test_baselines(tmp_path: Path) -> None:
    made = job("translate", tmp_path).task
    sources, targets = held_out(made)
    assert made.copied() == sources  # type: ignore[union-attr]
    known = dict(made.split.train)  # type: ignore[union-attr]
    assert set(made.nearest()) <= set(known.values())  # type: ignore[union-attr]
    scores = [compare(texts, targets) for texts in (sources, made.nearest())]  # type: ignore[union-attr]
    assert made.baseline() == {  # type: ignore[union-attr]
        name: max(score[name] for score in scores) for name in ("bleu", "chrf")
    }
    assert compare(targets, targets) == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}

    lead = job("summarise", tmp_path).task
    sources, _ = held_out(lead)
    first = [" ".join(source.split()[:4]) for source in sources]  # targets have four words
    assert lead.baseline() == lead.score({"texts": first})  # type: ignore[union-attr]


def test_long_sources_are_not_translated(tmp_path: Path) -> None:
    task = translate(str(pairs(tmp_path)), words=6).task
    with pytest.raises(DataError, match="too few pairs to learn from"):
        task.train_data()  # type: ignore[union-attr]


def test_without_sacrebleu_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(JobError, match=r"pip install 'lockstep-dlp\[text\]'"):
        compare(["a"], ["b"])


@pytest.mark.parametrize("name", NAMES)
def test_files_that_hold_no_pairs_are_refused_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine.tsv").write_text("text\tsummary\na\tb\n")
    task = recipes.find(name)(str(tmp_path / "mine.tsv")).task
    with pytest.raises(DataError, match=r"mine\.tsv is not a file of pairs"):
        task.train_data()  # type: ignore[union-attr]


# With the real data: up to half an hour each.

BARS = {"translate": ("chrf", 56.0), "summarise": ("rougeL", 0.40)}


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_defaults_reach_what_the_recipe_promises(name: str, run_folder: str) -> None:
    fetch("descriptions")
    result = lockstep.run(name, workers=2, shards=2, threads=1, out=run_folder, quiet=True)
    metric, bar = BARS[name]
    assert result.metrics[metric] >= bar
    for other, value in result.baseline.items():
        assert result.metrics[other] > value
