"""The report: complete, harmless whatever the run's strings are, and quick on long runs."""

from __future__ import annotations

import json
import math
import platform
import re
import time
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import RunFolderError
from lockstep.results.charts import POINTS, Curve, chart, loss_panel
from lockstep.results.report import LAST_EVENTS, write_report
from tests.support import recorded_runs

HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=alert(1)>"


class Tags(HTMLParser):
    """Collects the tags and attributes of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")


def ledger(losses: Iterable[float]) -> Iterable[dict[str, Any]]:
    for step, loss in enumerate(losses, start=1):
        yield {"step": step, "data_epoch": 0, "loss": loss.hex(), "samples": 64, "hash": "0" * 64}


def make_run(folder: Path, *, name: str = "digits", **result: Any) -> Path:
    """A finished run of 20 steps on two workers; `result` overrides its result's entries."""
    folder.mkdir()
    manifest = {
        "name": name,
        "job": {"seed": 0, "batch_size": 64, "threads": None, "clip": name},
        "plan": {"workers": 2, "shards": 4, "threads": 1, "reasons": [f"two cores for {name}"]},
        "versions": {"torch": "2.13.0"},
        "profile": {"capability": "AVX512"},
        "source": {"name": f"tasks:{name}", "args": {name: name}},
    }
    phases = {"compute": 2.0, "data": 0.1, "wait": 0.2, "reduce": 0.3, "update": 0.1}
    finished = {
        "fingerprint": "ab" * 32,
        "steps": 20,
        "samples_per_second": 1234.5,
        "metrics": {"accuracy": 0.9125},
        "workers": 2,
        "shards": 4,
        "threads": 1,
        "recoveries": [{"worker": 1, "detection_ms": 1.5, "recovery_ms": 98.7654}],
        "wall_seconds": 75.0,
        "history": [
            {"step": s, "data_epoch": 1, "metrics": {"accuracy": s / 22}} for s in (10, 20)
        ],
        "times": {"0": phases, "1": {**phases, "wait": 0.9, "evaluate": 0.4}},
        "startup_seconds": 1.5,
        "data_wait": 0.02,
        "checkpoints": ["step-20"],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "result.json").write_text(json.dumps(finished | result))
    lines(folder / "ledger.jsonl", ledger(2.0 / step for step in range(1, 21)))
    lines(
        folder / "events.jsonl", [{"time": "2026-01-01T10:00:00", "event": "started", "of": name}]
    )
    return folder


def page_of(folder: Path) -> str:
    path = write_report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def check_harmless(page: str) -> Tags:
    """No script, no handler, and nothing that the browser would fetch."""
    tags = Tags(page)
    assert not {"script", "img", "iframe", "object", "embed", "base"} & set(tags.tags)
    for name, value in tags.attributes:
        assert not name.startswith("on"), (name, value)
        if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert value.startswith(("#", "data:")), (name, value)
    style = "".join(re.findall(r"<style.*?</style>", page, flags=re.DOTALL))
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page
    return tags


def test_a_run_is_told(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "digits-1"))
    text = check_harmless(page).text
    assert "http" not in page.replace("http-equiv", "")
    for expected in (
        "digits", "ab" * 32, "1,234", "1.5 s", "75 s", "0.9125", "accuracy", "two cores for digits",
        "2.13.0", "AVX512", "tasks:digits", "lockstep verify digits-1", "detection ms", "98.77",
        "step-20", "started", "default", "2 %",
    ):  # fmt: skip
        assert expected in text, expected
    assert page.count("<svg") == 2, "the loss and one metric"
    assert len(re.findall(r'class="bar"', page)) == 2
    assert 'title="evaluate: 400 ms"' in page


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert write_report(folder).read_bytes() == write_report(folder).read_bytes()
    assert {path.suffix for path in folder.iterdir()} == {".json", ".jsonl", ".html"}
    assert len(list(folder.glob("*.html"))) == 1, "no draft is left"


def test_hostile_strings_are_only_text(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "a b;<b>$(id)",
        name=HOSTILE,
        fingerprint=HOSTILE,
        metrics={HOSTILE: HOSTILE, "items": 1.0},
        history=[{"step": 1, "metrics": {HOSTILE: 0.5, "items": 0.25}}],
        times={HOSTILE: {"compute": 1.0, HOSTILE: 2.0}},
        recoveries=[{HOSTILE: HOSTILE, "tags": [HOSTILE]}],
        checkpoints=[HOSTILE],
    )
    page = page_of(folder)
    tags = check_harmless(page)
    assert HOSTILE in tags.text
    assert page.count(HOSTILE) == 0
    assert "lockstep verify 'a b;<b>$(id)'" in tags.text, "quoted for the shell"


@pytest.mark.parametrize("name", ["\x1b[31m\x00", "\ud800", "{{ 7 * 7 }}", "\u202eevil", ""])
def test_odd_names(tmp_path: Path, name: str) -> None:
    assert "49" not in Tags(page_of(make_run(tmp_path / "run", name=name))).text[:200]


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    values = [math.nan, math.inf, -math.inf, None, "high", True, 10**400, 0.5]
    history = [{"step": s, "metrics": {"accuracy": v}} for s, v in enumerate(values)]
    folder = make_run(
        tmp_path / "run",
        history=[*history, {"step": 9}, {"metrics": {"f1": 1.0}}, "nonsense", None],
        metrics={"accuracy": math.nan, "f1": math.inf},
        times={"0": {"compute": math.nan, "wait": -1}, "1": None},
        samples_per_second=math.inf,
        wall_seconds=None,
    )
    lines(folder / "ledger.jsonl", ledger([1.0, math.nan, math.inf, 1e308, 0.5]))
    page = page_of(folder)
    text = Tags(page).text
    assert "7 values that are not finite" in text
    assert "3 steps without a finite loss" in text
    assert "0.5 at step 7" in text
    assert "0.5 at the last step" in text
    assert "nan" not in "".join(re.findall(r"<svg.*?</svg>", page))


def test_only_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    text = Tags(page_of(tmp_path)).text
    assert "has no result" in text
    assert "Nothing to draw" in text
    assert "lockstep resume" in text


def test_empty_ledger_and_torn_lines(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "ledger.jsonl").write_bytes(b"")
    assert "Nothing to draw" in page_of(folder)
    whole = "".join(json.dumps(entry) + "\n" for entry in ledger([2.0, 1.0]))
    (folder / "ledger.jsonl").write_bytes(b"\xff\xfe\n[1]\n" + whole.encode() + b'{"step": 3, "lo')
    assert "1 at the last step" in Tags(page_of(folder)).text


@pytest.mark.parametrize("content", [None, "[]", "{", '"x"', "[" * 100_000])
def test_a_folder_that_is_no_run(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(RunFolderError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_long_run_is_quick_and_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    lines(folder / "ledger.jsonl", ledger(2.0 + math.sin(step) for step in range(50_000)))
    events = [{"time": f"t{n}", "event": "tick", "n": n} for n in range(5_000)]
    lines(folder / "events.jsonl", events)
    start = time.perf_counter()
    page = page_of(folder)
    assert time.perf_counter() - start < 3
    assert len(page) < 300_000
    assert "mean of 128 steps" in page
    assert page.count("<td>tick</td>") == LAST_EVENTS
    assert "of 5,000" in page
    assert page.index("t4999") < page.index("t4800")
    assert "t4799" not in page


@pytest.mark.parametrize("count", [0, 1, POINTS, POINTS + 1, 2 * POINTS + 1, 10_007])
def test_a_curve_keeps_every_loss(count: int) -> None:
    losses = [float(n * 7919 % 1009) for n in range(count)]
    curve = Curve()
    for step, loss in enumerate(losses):
        curve.add(step, loss)
    assert len(curve.bins) <= POINTS
    assert sum(b.count for b in curve.bins) == curve.steps == count
    for b in curve.bins:
        mine = losses[b.first : b.last + 1]
        assert (b.count, b.total) == (len(mine), sum(mine))
        assert (b.low, b.high) == (min(mine), max(mine))
    assert [b.first for b in curve.bins] == list(range(0, count, curve.width))


@pytest.mark.parametrize(
    "values",
    [
        [0.0], [-3.0], [1.0, 1.0], [0.0, 0.0], [1.0, math.nextafter(1.0, 2.0)], [5e-324, 1e-323],
        [1e100, -1e100], [1e15, 1e15 + 0.125], [123456789.123, 123456789.1230001], [1e-90, 0.0],
    ],
)  # fmt: skip
def test_awkward_scales_are_drawn(values: list[float]) -> None:
    svg = chart(list(enumerate(values)), size=(490, 220))
    assert svg.startswith("<svg viewBox")
    assert "nan" not in svg
    assert "inf" not in svg
    assert "<script" not in svg
    assert "<style" not in svg
    assert "http" not in svg


def test_steps_that_are_none_are_skipped() -> None:
    entries: list[dict[str, Any]] = [
        {"step": step, "loss": (1.0).hex()} for step in (None, "1", -1, 1e300, math.nan)
    ]
    assert loss_panel(entries).chart == ""


def test_a_run_under_way_on_two_hosts(tmp_path: Path) -> None:
    """Its lanes, what all workers spent their time on, and a recovery in words."""
    seconds = [0.4, 0.0, 0.2, 0.1, 0.2, 0.1, 0.0]
    events = [
        recorded_runs.began(),
        *recorded_runs.workers(1, [0, 1]),
        *recorded_runs.workers(1, [0], host=f"b{HOSTILE}"),
        *recorded_runs.pace(2, 10),
        recorded_runs.line(2, "timed", host=f"b{HOSTILE}", seconds=1.0, workers={"0": seconds}),
        recorded_runs.line(2.5, "died", host=platform.node(), worker=1, step=12, how=HOSTILE),
        recorded_runs.line(3, "recovered", host=platform.node(), worker=1, pid=7, step=12,
                           how="was killed by SIGKILL", recovery_ms=500.0),
        recorded_runs.line(3, "evaluated", step=10, data_epoch=0, metrics={"accuracy": 0.75}),
    ]  # fmt: skip
    folder = recorded_runs.make_run(tmp_path / "digits-1", events, seed=7)
    page = page_of(folder)
    tags = check_harmless(page)
    assert page.count(HOSTILE) == 0
    for expected in (
        "running", "it is under way", "lockstep run mnist", "2026-11-01 10:00:00 UTC", "7,850",
        "2 hosts", "0.75", "worker 1, pid 7, was killed by SIGKILL at step 12: back in 500 ms",
        "exchange with hosts", f"0 of b{HOSTILE}", "seed", "as by default",
    ):  # fmt: skip
        assert expected in tags.text, expected
    (chart,) = re.findall(r'<svg[^>]*aria-label="Timeline.*?</svg>', page, re.DOTALL)
    assert len(re.findall('class="compute"', chart)) == 3
    assert len(re.findall('class="dead"', chart)) == 1
    assert len(re.findall('class="recovering"', chart)) == 1
    assert len(re.findall('class="bar"', page)) == 3
    assert page.index("0.75") < page.index("samples per second"), "the metric comes first"
