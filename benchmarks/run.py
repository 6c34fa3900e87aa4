"""Lockstep compared with DistributedDataParallel, one process, JAX and TensorFlow, on one host.

    python -m benchmarks.run                                   # all; about half an hour
    python -m benchmarks.run --quick --models softmax,mlp
    python -m benchmarks.run --only memory,cold --merge --write docs/benchmarks.md

Prints the tables, and keeps raw figures in benchmarks/results.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import footprint, process, report
from benchmarks.process import ContenderFailed

SECTIONS = ("speed", "memory", "cold")
FRAMEWORKS_PYTHON = process.ROOT / ".venv-frameworks" / "bin" / "python"
"""`make bench` makes it."""
MEMORY_CONTENDERS = ("lockstep", "ddp", "threads")
LEAST_STEPS = 20
OTHERS = 3
"""Of how many other machines the speeds are kept."""
BUSY, TOO_BUSY = 0.15, 0.5
"""Load per core at which to warn, and at which to refuse."""


_failures: list[str] = []
"""What could not be measured in this run; it is told on stderr, and in the exit status."""


def fail(text: str) -> None:
    """Tell and remember that something could not be measured."""
    _failures.append(text)
    say(f"    FAILED: {text}")


def say(text: str) -> None:
    """Progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


def measure(contender: str, model: str, seconds: float, steps: int) -> dict[str, Any] | None:
    """One measurement in fresh processes; None, with the reason on stderr, if it failed."""
    python, command = sys.executable, ["-m", "benchmarks.peers", contender, model]
    command += ["--seconds", str(seconds), "--steps", str(steps)]
    if contender in report.FRAMEWORKS:
        python, command = str(FRAMEWORKS_PYTHON), ["-m", "benchmarks.frameworks", contender, model]
        command += ["--seconds", str(seconds)]
    try:
        done = process.finish(command, python=python, timeout=120 + 10 * seconds)
    except ContenderFailed as error:
        fail(str(error))
        return None
    if done.orphans:
        fail(f"{contender} on {model} left {done.orphans} processes behind; they were killed")
    found: dict[str, Any] = done.json()
    return found


def steps_for(model: str, seconds: float) -> int:
    """Steps that two workers make in about `seconds`, by a short run of `nosync`."""
    found = measure("nosync", model, min(0.5, seconds), 0)
    if found is None:
        raise ContenderFailed(f"{model}: the calibrating run failed")
    return max(LEAST_STEPS, int(found["steps"] * seconds / found["seconds"]))


def speed(model: str, contenders: Sequence[str], repeats: int, seconds: float) -> dict[str, Any]:
    """All contenders on one model, taking turns."""
    entry: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "load": process.load(),
        "repeats": repeats,
        "seconds": seconds,
    }
    before = process.cpu_times()
    steps = steps_for(model, seconds)
    if model in report.NOT_OF_FRAMEWORKS:
        contenders = [name for name in contenders if name not in report.FRAMEWORKS]
    if model in report.NOT_COMPILED:
        contenders = [name for name in contenders if name != "lockstep_compiled"]
    rates: dict[str, list[float | None]] = {name: [] for name in contenders}
    fingerprints: list[str] = []
    plans: list[dict[str, int]] = []
    for repetition in range(repeats):
        turn = repetition % len(contenders)
        for contender in [*contenders[turn:], *contenders[:turn]]:
            found = measure(contender, model, seconds, steps)
            rates[contender].append(None if found is None else round(found["rate"], 1))
            if found is None:
                continue
            say(f"  {model} {repetition + 1}/{repeats} {contender:<10} {found['rate']:>10,.0f}/s")
            if contender == "lockstep":
                fingerprints.append(found["fingerprint"])
            elif contender == "auto":
                plans.append(found["plan"])
    steal = process.share(before, process.cpu_times(), "steal")
    entry |= {"steps": steps, "steal": round(steal, 4), "rates": rates}
    return entry | {"fingerprints": fingerprints, "plans": plans}


def memory(models: Sequence[str], seconds: float) -> dict[str, Any]:
    """PSS of the contenders on each model, and of processes that only import torch."""
    found: dict[str, Any] = {"idle": footprint.idle_memory()}
    for model in models:
        sizes = process.finish(["-m", "benchmarks.peers", "sizes", model], timeout=60).json()
        used: dict[str, Any] = {}
        steps = steps_for(model, 2 * seconds)
        for contender in MEMORY_CONTENDERS:
            taken = attempt(
                functools.partial(footprint.memory, contender, model, 2 * seconds, steps)
            )
            if taken is not None:
                used[contender] = taken
                say(f"  {model} {contender:<10} {taken['median'] / 2**20:>8,.0f} MiB")
        found[model] = {"sizes": sizes, "pss": used}
    return found


def cold(quick: bool) -> dict[str, list[float]]:
    """Seconds to import, and to the first committed step."""
    times = 2 if quick else footprint.IMPORT_TIMES
    runs = 2 if quick else footprint.COLD_TIMES
    tries: dict[str, Callable[[], list[float]]] = {
        "first step": lambda: footprint.first_steps(runs),
        "import lockstep": lambda: footprint.imports("lockstep", times),
        "import torch": lambda: footprint.imports("torch", times),
    }
    found = {name: attempt(action) for name, action in tries.items()}
    return {n: [round(value, 4) for value in values] for n, values in found.items() if values}


def attempt(action: Callable[[], Any]) -> Any:
    """What `action` returns; None, with the reason on stderr, if a contender failed."""
    try:
        return action()
    except ContenderFailed as error:
        fail(str(error))
        return None


def quiet_enough(force: bool) -> bool:
    """Whether the machine is idle enough to measure on; says so if not."""
    before = process.cpu_times()
    time.sleep(1)
    busy = 1 - process.share(before, process.cpu_times(), "idle")
    load, cores = process.load(), process.machine()["cores"]
    state = f"load {load:.2f} on {cores} cores, {100 * busy:.0f} % busy in the last second"
    if max(load / cores, busy) < BUSY:
        return True
    if max(load / cores, busy) < TOO_BUSY or force:
        say(f"warning: the machine is not idle ({state}); the figures will suffer")
        return True
    say(f"refused: {state}. Wait until it is idle, or take the figures as they come: --force")
    return False


def choice(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argument type: some of `known`, joined by commas."""

    def parse(text: str) -> list[str]:
        chosen = [part.strip() for part in text.split(",")]
        if unknown := [part for part in chosen if part not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {unknown}; known: {', '.join(known)}")
        return chosen

    return parse


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    models = list(report.MODELS)
    add("--models", type=choice(models), default=models, help=f"some of {','.join(models)}")
    add("--only", type=choice(SECTIONS), default=list(SECTIONS), help="speed, memory or cold")
    add(
        "--contenders",
        type=choice(report.CONTENDERS),
        default=list(report.CONTENDERS),
        help="for speed",
    )
    add("--repeats", type=int, default=5)
    add("--seconds", type=float, default=2.0, help="of each timed run (default 2)")
    add("--quick", action="store_true", help="2 repetitions of half a second: only a smoke test")
    add("--results", type=Path, default=process.ROOT / "benchmarks" / "results.json")
    add("--merge", action="store_true", help="keep what the results hold of other parts")
    add("--write", type=Path, metavar="PAGE", help="write the page, e.g. docs/benchmarks.md")
    add("--force", action="store_true", help="measure on a busy machine too")
    options = parser.parse_args(given)
    if options.quick:
        options.repeats, options.seconds = 2, 0.5
    if options.repeats < 1 or not 0 < options.seconds <= 60:
        parser.error("--repeats must be 1 or more, --seconds above 0 and at most 60")
    return options


def stored(path: Path) -> dict[str, Any]:
    """What earlier runs have found; nothing if there is no such file."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def begin(before: Mapping[str, Any], machine: dict[str, Any], merge: bool) -> dict[str, Any]:
    """Results to go on with: those of this same machine and torch if they are to be merged. The
    speeds that other machines had are kept beside them."""
    others = list(before.get("others", []))
    if before.get("machine") == machine:
        return {**before, "others": others} if merge else {"machine": machine, "others": others}
    if merge:
        say("the results are from another machine or other versions: not merged")
    if speeds := before.get("speed"):
        others.insert(0, {"machine": before["machine"], "speed": speeds})
    return {"machine": machine, "others": others[:OTHERS]}


def main() -> int:
    """Measure, print and write; 1 if the machine was too busy or something failed."""
    options = arguments()
    if not quiet_enough(options.force):
        return 1
    process.adopt_orphans()
    machine = process.machine()
    results = begin(stored(options.results), machine, options.merge)

    def save() -> None:
        options.results.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")

    if "speed" in options.only:
        for model in options.models:
            found = speed(model, options.contenders, options.repeats, options.seconds)
            results.setdefault("speed", {})[model] = found
            save()
    if "memory" in options.only:
        results["memory"] = results.get("memory", {}) | memory(options.models, options.seconds)
        save()
    if "cold" in options.only:
        results["cold"] = results.get("cold", {}) | cold(options.quick)
        save()
    text = report.page(results)
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(text)
    return 1 if _failures else 0


if __name__ == "__main__":
    sys.exit(main())
