"""The page in Chromium: a real run, a worker killed while it is watched, scaled from the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.file_tree import ROOT
from tests.support.harmed_runs import events, until
from tests.support.paced_task import PACE

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("uvicorn", reason="the extra dashboard is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
ARGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WAIT = 60.0

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium"),
]


@pytest.fixture
def page() -> Iterator[Any]:
    """A page in which every error of a script, and every breach of its policy, is an error."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console",
            lambda message: errors.append(message.text) if message.type == "error" else None,
        )
        page.set_default_timeout(WAIT * 1000)
        yield page
        browser.close()
        # The server ends with the run, and one run that is asked for is not there.
        unexpected = [e for e in errors if not e.startswith("Failed to load resource")]
        assert not unexpected


def pixels(page: Any, number: int) -> list[int]:
    """How many pixels of a worker's lane have the colour of a dead worker, and of computing."""
    counts: list[int] = page.evaluate(
        """(number) => {
          const canvas = document.querySelector(".timeline canvas"), ratio = devicePixelRatio;
          const top = (26 + 5 + number * 35) * ratio;
          const { data } = canvas.getContext("2d").getImageData(0, top, canvas.width, 30 * ratio);
          const style = getComputedStyle(document.documentElement);
          return ["--dead", "--compute"].map((name) => {
            const hex = style.getPropertyValue(name).trim();
            const rgb = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
            let count = 0;
            for (let i = 0; i < data.length; i += 4) {
              count += rgb.every((part, channel) => Math.abs(data[i + channel] - part) < 6);
            }
            return count;
          });
        }""",
        number,
    )
    return counts


def test_a_run_is_watched_and_steered(page: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable, "-m", "lockstep", "run", "tests.support.paced_task:Paced",
        "--workers", "2", "--max-workers", "4", "--shards", "4", "--batch-size", "16",
        "--data-epochs", "5000", "--dashboard", "--quiet", "--out", str(out),
    ]  # fmt: skip
    run = subprocess.Popen(command, cwd=ROOT, env={**os.environ, PACE: "0.01"})
    try:
        address = out / "dashboard.url"
        until(address.exists, WAIT, "the page's address")
        page.goto(address.read_text().strip())
        page.locator(".pill.running").wait_for()
        assert "token" not in page.url
        until(lambda: pixels(page, 1)[1] > 50, WAIT, "a lane with what worker 1 computes")
        assert pixels(page, 1)[0] == 0

        # A death, seen at once: as an event, on the curve and in the lane.
        pid = [event["pid"] for event in events(out, "joined") if event["worker"] == 1][-1]
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        page.locator(".event.died").wait_for()
        assert time.monotonic() - killed < 2.0  # alone on a machine: 0.15 s (docs/dashboard.md)
        page.locator(".event.recovered").wait_for()
        text = page.locator(".event.died").inner_text()
        assert f"worker 1, pid {pid}, was killed by SIGKILL" in text
        until(lambda: pixels(page, 1)[0] > 0, WAIT, "a lane in which worker 1 was dead")
        page.locator(".recoveries li").wait_for()
        for name in ("Throughput", "Learning rate", "Memory of a worker"):
            chart = page.locator("figure", has=page.locator("h3", has_text=name))
            chart.locator("canvas").wait_for()

        # Scaling: asked, confirmed and obeyed; refused beyond what the run can have.
        page.fill("#workers", "3")
        page.get_by_role("button", name="Scale").click()
        page.locator("#yes").click()
        until(lambda: [0, 1, 2] in [e["seats"] for e in events(out, "formed")], WAIT, "a third")
        page.locator(".event.request", has_text="scale to 3").wait_for()
        until(lambda: pixels(page, 2)[1] > 50, WAIT, "a lane of the third worker")
        before = len(events(out, "request"))
        page.get_by_role("button", name="Checkpoint").click()
        page.locator("dialog").get_by_role("button", name="Cancel").click()
        assert len(events(out, "request")) == before

        # The keyboard: the last value of the curve, and back in time in the timeline.
        page.locator(".plot").first.focus()
        page.keyboard.press("ArrowLeft")
        assert re.search(r"step \d", page.locator("figure .hover").first.inner_text())
        page.locator(".timeline canvas").focus()
        page.keyboard.press("+")
        page.keyboard.press("ArrowLeft")

        # At the width of a phone nothing sticks out.
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == 390

        page.get_by_role("button", name="Stop").click()
        page.locator("#yes").click()
        page.locator(".pill.stopped").wait_for()
        assert run.wait(WAIT) != 0  # stopped: there is no result
        assert not address.exists()
    finally:
        run.kill()
        run.wait()


def test_runs_are_listed_and_compared(page: Any, tmp_path: Path) -> None:
    import lockstep
    from tests.support.paced_task import Paced

    for seed in (0, 1):
        lockstep.run(
            Paced(), workers=1, data_epochs=4, batch_size=16, shards=4, seed=seed, quiet=True,
            out=tmp_path / f"run-{seed}",
        )  # fmt: skip
    hostile = "<img src=x onerror=document.title=1>"
    result = json.loads((tmp_path / "run-0" / "result.json").read_text())
    result["metrics"][hostile] = 1.0
    (tmp_path / "run-0" / "result.json").write_text(json.dumps(result))
    told = {"event": "plan", "predicted": 0.5, "workers": 1}
    with (tmp_path / "run-0" / "events.jsonl").open("a") as file:
        file.write(json.dumps(told) + "\n")
    command = [sys.executable, "-m", "lockstep", "watch", str(tmp_path)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        page.goto(server.stdout.readline().split()[-1])
        for name in ("run-0", "run-1"):
            page.get_by_label(f"compare {name}").check()
        page.get_by_role("button", name="Compare two").click()
        page.get_by_text("The ledgers differ from the first step on").wait_for()
        row = page.get_by_role("row").filter(has_text="setting seed")
        assert row.get_by_role("cell").all_inner_texts() == ["0", "1"]
        page.get_by_role("link", name="run-0").click()
        page.locator(".pill.finished").wait_for()
        assert hostile in page.locator(".tiles").inner_text()
        assert "predicted 32 for 1 worker" in page.locator(".tiles").inner_text()
        assert page.locator("main img").count() == 0
        page.goto(page.url.partition("/run/")[0] + "/run/nothing")
        page.get_by_text("there is no such run").wait_for()
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.wait()
