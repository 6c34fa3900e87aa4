"""Dashboard pictures: those of docs/dashboard.md, of real runs in Chromium.

lockstep data fetch mnist
python -m tests.support.dashboard_pictures docs/pictures

`python -m tests.support.dashboard_pictures docs/pictures killed` makes the README's alone.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.support.harmed_runs import events, until

WAIT = 120.0
PLANNED = ["run", "mnist", "--model", "cnn", "--max-workers", "4", "--quiet"]
RUN = [*PLANNED, "--workers", "2"]
HOVER = 150
"""How far what the pointer shows hangs out of the timeline, in pixels."""


def lockstep(*arguments: str, folder: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lockstep", *arguments]
    return subprocess.Popen(command, cwd=folder, text=True, **options)


def keep(png: bytes, path: Path) -> None:
    """Write a picture, packed as well as it goes."""
    Image.open(io.BytesIO(png)).convert("RGB").save(path, optimize=True)
    print(f"{path}  {path.stat().st_size / 1e3:.0f} kB")


def take(place: Path, folder: Path) -> None:
    for epochs, seed in (("6", "0"), ("6", "1")):
        ended = lockstep(*RUN, "--data-epochs", epochs, "--seed", seed, folder=folder)
        assert ended.wait() == 0
    run = lockstep(*PLANNED, "--data-epochs", "60", folder=folder)
    server = lockstep("watch", "--port", "0", folder=folder, stdout=subprocess.PIPE)
    assert server.stdout is not None
    address = server.stdout.readline().split()[-1]
    front, token = address.split("#")
    out = folder / "runs" / "mnist-3"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--headless", "--no-sandbox", "--disable-gpu"],
        )
        page = browser.new_page(viewport={"width": 1120, "height": 1010})
        until((out / "events.jsonl").exists, WAIT, "the run")
        page.goto(f"{front}run/mnist-3#{token}")
        page.locator(".pill.running").wait_for()
        time.sleep(8)
        page.fill("#workers", "3")
        page.get_by_role("button", name="Scale").click()
        page.locator("#yes").click()
        time.sleep(6)
        pid = [event["pid"] for event in events(out, "joined") if event["worker"] == 1][-1]
        os.kill(pid, signal.SIGKILL)
        page.locator(".event.recovered").wait_for()
        time.sleep(4)
        keep(page.screenshot(), place / "live.png")
        page.emulate_media(color_scheme="dark")
        time.sleep(1)
        keep(page.screenshot(), place / "dark.png")
        page.emulate_media(color_scheme="light")
        canvas = page.locator(".timeline canvas")
        canvas.scroll_into_view_if_needed()
        page.evaluate("scrollBy(0, 250)")
        box = canvas.bounding_box()
        assert box is not None
        lane = box["y"] + 26 + 5 + 35 + 15
        page.mouse.move(box["x"] + page.evaluate(LAST_DEATH), lane)
        page.keyboard.down("Control")
        for _ in range(8):
            page.mouse.wheel(0, -100)
            time.sleep(0.1)
        page.keyboard.up("Control")
        time.sleep(0.5)
        page.mouse.move(box["x"] + page.evaluate(LAST_DEATH) + 1, lane)
        time.sleep(0.5)
        around = page.locator("section", has=canvas).bounding_box()
        assert around is not None
        around["height"] += HOVER
        keep(page.screenshot(clip=around), place / "recovery.png")
        page.mouse.move(0, 0)
        charts = page.locator("section", has=page.get_by_role("heading", name="Metrics"))
        charts.scroll_into_view_if_needed()
        keep(charts.screenshot(), place / "curves.png")
        page.set_viewport_size({"width": 390, "height": 844})
        page.evaluate("scrollTo(0, 0)")
        time.sleep(1)
        keep(page.screenshot(), place / "phone.png")
        page.set_viewport_size({"width": 1120, "height": 420})
        page.goto(f"{front}#{token}")
        page.reload()
        page.get_by_label("compare mnist-1").check()
        page.get_by_label("compare mnist-2").check()
        keep(page.screenshot(), place / "runs.png")
        page.get_by_role("button", name="Compare two").click()
        page.locator(".plot canvas").first.wait_for()
        page.set_viewport_size({"width": 1120, "height": 1010})
        time.sleep(1)
        keep(page.screenshot(), place / "comparison.png")
        browser.close()
    run.send_signal(signal.SIGINT)
    server.send_signal(signal.SIGINT)
    run.wait(WAIT)
    server.wait(WAIT)


def take_killed(place: Path, folder: Path) -> None:
    """The README's picture: the timeline of a run in which a worker is killed, and below it the
    comparison with the same run undisturbed."""
    settings = [*RUN, "--data-epochs", "10", "--run-name"]
    assert lockstep(*settings, "undisturbed", folder=folder).wait() == 0
    run = lockstep(*settings, "killed", folder=folder)
    out = folder / "runs" / "killed-1"
    until(
        lambda: (out / "events.jsonl").exists() and len(events(out, "evaluated")) > 3,
        WAIT,
        "some epochs",
    )
    os.kill(events(out, "joined")[-1]["pid"], signal.SIGKILL)
    assert run.wait(WAIT) == 0
    assert len(events(out, "died")) == 1
    server = lockstep("watch", "--port", "0", folder=folder, stdout=subprocess.PIPE)
    assert server.stdout is not None
    front, token = server.stdout.readline().split()[-1].split("#")
    parts = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--headless", "--no-sandbox", "--disable-gpu"],
        )
        page = browser.new_page(viewport={"width": 960, "height": 1400})
        page.goto(f"{front}run/killed-1#{token}")
        page.locator(".pill.finished").wait_for()
        page.locator(".recoveries li").wait_for()
        time.sleep(1)
        canvas = page.locator(".timeline canvas")
        parts.append(page.locator("section", has=canvas).screenshot())
        page.goto(f"{front}#{token}")
        page.reload()
        page.get_by_label("compare undisturbed-1").check()
        page.get_by_label("compare killed-1").check()
        page.get_by_role("button", name="Compare two").click()
        page.locator("table.side").first.wait_for()
        time.sleep(1)
        parts.append(page.locator("main > p").last.screenshot())
        parts.append(page.locator("section", has=page.locator("table.side")).first.screenshot())
        browser.close()
    server.send_signal(signal.SIGINT)
    server.wait(WAIT)
    pictures = [Image.open(io.BytesIO(part)).convert("RGB") for part in parts]
    height = sum(each.height + 16 for each in pictures) + 16
    whole = Image.new("RGB", (max(each.width for each in pictures) + 32, height), "white")
    y = 16
    for each in pictures:
        whole.paste(each, (16, y))
        y += each.height + 16
    packed = io.BytesIO()
    whole.save(packed, "PNG")
    keep(packed.getvalue(), place / "killed.png")


LAST_DEATH = """() => {
  const canvas = document.querySelector(".timeline canvas"), ratio = devicePixelRatio;
  const { data, width } = canvas.getContext("2d").getImageData(0, 75 * ratio, canvas.width, 1);
  const hex = getComputedStyle(document.documentElement).getPropertyValue("--dead").trim();
  const rgb = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  for (let x = width - 1; x > 0; x--) {
    if (rgb.every((part, channel) => Math.abs(data[4 * x + channel] - part) < 30)) {
      return x / ratio;
    }
  }
  return canvas.clientWidth / 2;
}"""


def main() -> None:
    place = Path(sys.argv[1]).resolve()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="lockstep-pictures-") as folder:
        (take_killed if "killed" in sys.argv[2:] else take)(place, Path(folder))


if __name__ == "__main__":
    main()
