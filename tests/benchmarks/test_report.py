"""The benchmark's pure parts: ratios, verdicts, tables, batches; no contender is run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import footprint, models, process, recipes, report, run
from benchmarks.frameworks import shapes
from lockstep.job.job import Job
from tests.support.named_tasks import Blobs

RATES: dict[str, list[float | None]] = {
    "lockstep": [400.0, 390.0, None],
    "lockstep_compiled": [500.0, 490.0, 480.0],
    "ddp": [100.0, 130.0, 110.0],
    "ddp_malloc": [90.0, 95.0, 80.0],
    "nosync": [410.0, 400.0, 405.0],
    "meet": [405.0, 395.0, 402.0],
    "threads": [200.0, 210.0, 220.0],
    "compiled": [100.0, 105.0, 110.0],
    "auto": [400.0, 300.0, 500.0],
    "tensorflow": [800.0, 390.0, None],
    "jax": [200.0, 195.0, 210.0],
}


def entry(rates: dict[str, list[float | None]]) -> dict[str, Any]:
    return {
        "date": "2026-01-01T00:00:00+00:00", "load": 0.01, "steal": 0.002, "repeats": 3,
        "seconds": 2.0, "steps": 100, "rates": rates, "fingerprints": ["a", "a"],
        "plans": [{"workers": 1, "threads": 2, "shards": 1}] * 3,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    return {
        "processor": "P", "cores": 2, "memory_gib": 8.0, "kernel": "6", "python": "3.11",
        "torch": "2.13",
    }  # fmt: skip


def test_ratios_are_taken_within_repetitions_and_skip_failures() -> None:
    ratio = report.pairwise(RATES, "lockstep", "ddp")
    assert ratio == report.Ratio(middle=3.5, low=3.0, high=4.0, pairs=2)


def test_a_ratio_without_a_common_repetition_is_none() -> None:
    assert report.pairwise({"a": [1.0, None], "b": [None, 2.0]}, "a", "b") is None
    assert report.pairwise(RATES, "lockstep", "absent") is None
    assert report.pairwise(RATES, "lockstep", None) is None


def test_the_best_is_by_median_and_ignores_what_never_finished() -> None:
    assert report.best(RATES, report.DDP) == "ddp"
    assert report.best({"ddp": [None], "ddp_malloc": [1.0]}, report.DDP) == "ddp_malloc"
    assert report.best({}, report.DDP) is None


def test_comparisons_have_their_bars_and_nosync_is_no_alternative_to_auto() -> None:
    lines = report.compare("softmax", RATES)
    assert (lines[-1].what, lines[-1].bar) == ("lockstep_compiled / jax", 1.0)
    found = {line.what.split()[2]: line for line in lines[:-1]}
    over_ddp, auto = found["ddp"], found["best"]
    assert (over_ddp.what, over_ddp.bar, over_ddp.verdict) == ("lockstep / ddp", 4.0, "miss")
    assert (found["nosync"].bar, found["nosync"].verdict) == (0.9, "pass")
    assert (found["meet"].bar, found["meet"].verdict) == (None, "—")
    assert (found["threads"].bar, found["threads"].verdict) == (1.0, "pass")
    assert (found["tensorflow"].bar, found["tensorflow"].verdict) == (1.0, "miss")
    assert (found["jax"].bar, found["jax"].verdict) == (None, "—")
    assert auto.what == "auto / best other (lockstep)"
    assert auto.bar == 0.97
    assert auto.ratio is not None
    assert auto.ratio.pairs == 2


def test_what_a_framework_has_no_equal_of_is_not_compared_with_it() -> None:
    assert not [line for line in report.compare("sparse", RATES) if "jax" in line.what]


def test_all_compare_the_same_models() -> None:
    """The other frameworks' sizes are written down on their own: nothing of torch is there."""
    for name, other in shapes.MODELS.items():
        case = models.CASES[name]
        count = sum(parameter.numel() for parameter in case.model().parameters())
        assert sum(math.prod(shape) for shape in other.parameters.values()) == count
        assert (other.batch, other.classes) == (case.batch * models.WORLD, case.classes)
        assert (other.values, math.prod(other.sample)) == (case.values, math.prod(case.shape))
    assert set(models.CASES) - set(shapes.MODELS) == set(report.NOT_OF_FRAMEWORKS)


def test_the_tables_of_every_contender_touch_only_the_rows_that_were_looked_up() -> None:
    case = models.CASES["sparse"]
    model = models.SparseLookup()
    before = model.table.weight.detach().clone()
    optimizer = case.optimizer(list(model.named_parameters()))
    batch = case.draw(4)()
    case.loss(model, batch).backward()
    optimizer.step()
    changed = (model.table.weight != before).any(1).nonzero().flatten()
    assert torch.equal(changed, batch[0].unique())


@pytest.mark.parametrize(
    ("middle", "verdict"), [(0.949, "miss"), (0.95, "pass"), (1.2, "pass"), (None, "not measured")]
)
def test_verdicts(middle: float | None, verdict: str) -> None:
    ratio = middle and report.Ratio(middle=middle, low=0.1, high=2.0, pairs=5)
    line = report.Comparison(model="mlp", what="x", ratio=ratio or None, bar=0.95)
    assert line.verdict == verdict


def test_every_model_has_its_description_and_its_bar() -> None:
    assert list(models.CASES) == list(report.MODELS) == list(report.DDP_BARS)


def test_a_table_has_equal_columns_in_every_line() -> None:
    lines = report.table(("a", "b"), [("1", "2"), ("3", "4")]).splitlines()
    assert lines == ["| a | b |", "| --- | ---: |", "| 1 | 2 |", "| 3 | 4 |"]


def test_the_page_shows_rates_ratios_memory_and_start_up() -> None:
    results = {
        "machine": machine(),
        "speed": {"softmax": entry(RATES)},
        "memory": {
            "idle": {"1": 200 * 2**20, "2": 300 * 2**20},
            "mlp": {
                "sizes": {"parameters": 2**20, "gradients": 2**20, "adam_state": 2**21, "data": 0},
                "pss": {"ddp": {"median": 550 * 2**20, "greatest": 2**30, "processes": 4}},
            },
        },
        "cold": {"first step": [1.0, 3.0, 2.0], "import torch": []},
    }
    text = report.page(results)
    assert (
        "| softmax | 395 | 490 | 110 | 90 | 405 | 402 | 210 | 105 | 400 | 595 | 200 | 1x2" in text
    )
    assert "| softmax | lockstep / ddp | 3.50 | 3.00 to 4.00 | 2 | 4.00 | miss |" in text
    assert "200 MiB alone, two together 300 MiB" in text
    assert "| mlp | 1.0 | 1.0 | 2.0 | 0.0 | — | 550 (4) | — |" in text
    assert "| first step | 2.000 | 1.000 to 3.000 | 3 |" in text
    assert "import torch |" not in text
    assert "the same fingerprint" in text
    assert report.page({"machine": machine()}).count("##") == 0


def test_different_fingerprints_are_shouted() -> None:
    changed = entry(RATES) | {"fingerprints": ["a", "b"]}
    text = report.page({"machine": machine(), "speed": {"mlp": changed}})
    assert "**The repetitions of `lockstep` ended in different fingerprints: ['mlp'].**" in text


@pytest.mark.parametrize("world", [1, 2])
def test_a_pass_draws_each_sample_once_over_all_ranks(world: int) -> None:
    samples = torch.arange(64)
    draws = [models.Draw((samples, samples), 8, rank, world) for rank in range(world)]
    for _ in range(2):
        drawn = [draw()[0] for _ in range(64 // 8 // world) for draw in draws]
        assert sorted(torch.cat(drawn).tolist()) == samples.tolist()


def test_two_ranks_draw_the_halves_of_what_one_process_draws() -> None:
    samples = torch.arange(64)
    whole = models.Draw((samples, samples), 16)
    halves = [models.Draw((samples, samples), 8, rank, 2) for rank in range(2)]
    for _ in range(6):
        assert torch.equal(whole()[1], torch.cat([half()[1] for half in halves]))


def test_a_recipe_is_trained_by_its_own_job() -> None:
    """Of the batch of a job each rank draws its part; the limit of the norm is kept to."""
    recipe = recipes.Recipe(Job(task=Blobs(), batch_size=16, clip_grad_norm=1e-3))
    parts = [recipe.draw(recipe.batch, rank, models.WORLD)() for rank in range(models.WORLD)]
    whole = recipe.draw(models.WORLD * recipe.batch)()
    for tensor, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(tensor, torch.cat(pieces))
    model = recipe.model()
    optimizer = recipe.optimizer(list(model.named_parameters()))
    recipe.loss(model, whole).backward()
    recipe.update(optimizer)
    squares = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    assert 0 < squares**0.5 < 1.001e-3


def test_recipes_are_compared_by_repetitions() -> None:
    rates: report.Rates = {
        "lockstep": [90.0, 50.0, 110.0], "ddp": [60.0, 30.0, None], "ddp_malloc": [50.0] * 3
    }  # fmt: skip
    assert recipes.row("clicks", rates) == [
        "`clicks`", "90", "45", "50", "1.80", "1.00 to 2.20"
    ]  # fmt: skip
    assert recipes.row("clicks", {}) == ["`clicks`", *"—————"]


def test_recipes_and_models_have_different_names() -> None:
    assert not set(models.CASES) & set(recipes.COMPARED)
    assert isinstance(recipes.find("sparse"), models.Case)


def test_batches_divide_the_data() -> None:
    assert all(models.SAMPLES % (models.WORLD * c.batch) == 0 for c in models.CASES.values())


def test_arguments_name_what_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    options = run.arguments(["--quick", "--models", "mlp, cnn", "--only", "cold"])
    assert (options.models, options.only, options.repeats) == (["mlp", "cnn"], ["cold"], 2)
    for wrong in (["--models", "bert"], ["--repeats", "0"], ["--seconds", "0"]):
        with pytest.raises(SystemExit):
            run.arguments(wrong)
    assert "bert" in capsys.readouterr().err


def test_only_results_of_the_same_machine_are_merged() -> None:
    here, speed = machine(), {"mlp": entry(RATES)}
    assert run.begin({}, here, merge=True) == {"machine": here, "others": []}
    cold = {"machine": here, "cold": {"first step": [1.0]}}
    assert "cold" in run.begin(cold, here, merge=True)
    assert "cold" not in run.begin(cold, here, merge=False)
    elsewhere = here | {"torch": "2.14"}
    assert "cold" not in run.begin(cold, elsewhere, merge=True)
    others = [{"machine": number, "speed": speed} for number in range(3)]
    before: dict[str, Any] = {"machine": here, "speed": speed, "others": others}
    kept = run.begin(before, elsewhere, merge=False)["others"]
    assert kept == [{"machine": here, "speed": speed}, *others[:2]]


def test_machines_stand_side_by_side() -> None:
    results = {"machine": machine(), "speed": {"mlp": entry(RATES)}}
    slower = RATES | {"lockstep": [200.0, 195.0, None]}
    other = {"machine": machine() | {"processor": "Q (avx2)"}, "speed": {"mlp": entry(slower)}}
    text = report.page({**results, "others": [other]})
    assert "| model | ratio | P, 2026-01-01 | Q, 2026-01-01 |" in text
    assert "| mlp | lockstep / jax | 2.00 | 1.00 |" in text
    assert "Other machines" not in report.page({**results, "others": []})


def test_the_first_step_is_found_among_events(tmp_path: Path) -> None:
    assert footprint.first_step_time(tmp_path) is None
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "start", "time": "2026-01-01T00:00:00+00:00"}\n{"event": "first_st')
    assert footprint.first_step_time(tmp_path) is None
    path.write_text('{"event": "first_step", "time": "1970-01-01T00:01:00.5+00:00"}\n')
    assert footprint.first_step_time(tmp_path) == 60.5


def test_a_command_is_bounded_and_its_failure_is_told() -> None:
    assert process.finish(["-c", "print('x'); print('[1]')"], timeout=30).json() == [1]
    with pytest.raises(process.ContenderFailed, match="status 3"):
        process.finish(["-c", "raise SystemExit(3)"], timeout=30)
    with pytest.raises(process.ContenderFailed, match="no end after"):
        process.finish(["-c", "import time; time.sleep(60)"], timeout=0.3)


def test_memory_of_an_ended_process_is_unknown() -> None:
    assert process.pss([2**22 + 1]) is None


def test_memory_is_that_of_all_processes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([[1], [1, 2], [1, 2], [1, 2], [1, 2, 3], *[[1]] * 9])
    monkeypatch.setattr(footprint, "descendants", lambda _: next(seen))
    monkeypatch.setattr(footprint, "pss", lambda pids: 10 * len(pids))
    watch = footprint.MemoryWatch(lambda output: output == "steady")
    assert watch(0, "")
    with pytest.raises(process.ContenderFailed):
        watch.summary()
    for _ in range(14):
        assert watch(0, "steady")
    assert watch.summary() == {"median": 30, "greatest": 30, "processes": 3}
