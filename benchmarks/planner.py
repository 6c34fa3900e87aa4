"""The planner's choices and predictions, compared with what is measured.

    python -m benchmarks.planner                                # ten models, three places
    python -m benchmarks.planner --models mlp,bert --places here --seconds 1

Places are this machine, and two hosts, network namespaces of it with a core each, on links of so
many bits a second (needs root and iproute2). Of every candidate a run is timed, so a row takes one
to three minutes. Each row has the choice against the best one measured, and of the choice the
predicted against the measured step; here also the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import namespaces, process, random_models, report
from benchmarks.namespaces import Network

OWN = ("softmax", "mlp", "cnn", "transformer", "embedding")
PLACES = ("here", "1gbit", "100mbit")
BATCH, LIMIT = 64, 240.0
LEAST_STEPS, MANY_STEPS = 20, 10_000
LOOK_SECONDS = 0.05
GOOD_CHOICE, GOOD_STEP, GOOD_MEMORY = 0.05, 0.15, 0.20


def job_of(model: str) -> dict[str, Any]:
    """The task of a model, with the settings of its runs."""
    own = model in OWN
    task = "benchmarks.tasks:Benchmark" if own else "benchmarks.random_models:RandomModel"
    return {"task": task, "args": {"name": model}, "batch_size": BATCH, "threads": 1, "seed": 1}


def member(args: argparse.Namespace) -> dict[str, Any]:
    """Plan one model at one place, and time every candidate."""
    import lockstep
    from lockstep.api.training import explain

    settings = {**job_of(args.model), "evaluate": False, "purity": 0.0, "quiet": True}
    task = settings.pop("task")
    loaded = _loaded(task, settings)
    quick = explain(task, measure=0, steps=MANY_STEPS, **settings).decision.chosen
    assert quick is not None
    steps = max(LEAST_STEPS, int(args.seconds / quick.prediction.seconds))
    planning = time.monotonic()
    with _agents(args, "plan") as on:
        explained = explain(task, on=on, measure=2, steps=steps, **settings)
    cold = time.monotonic() - planning
    ranked = [
        (dict(each.prediction.candidate.workers), each.prediction.seconds)
        for each in explained.decision.ranked
    ]
    chosen = explained.decision.chosen
    assert chosen is not None
    rows: list[dict[str, Any]] = []
    for number, (workers, predicted) in enumerate(ranked):
        several = len(workers) > 1
        with (
            _agents(args if several else argparse.Namespace(network=""), str(number)) as on,
            tempfile.TemporaryDirectory(prefix="lockstep-bench-") as out,
            _memory() as used,
        ):
            result = lockstep.run(
                task,
                on=on,
                workers=sum(workers.values()),
                steps=steps,
                out=f"{out}/run",
                **settings,
            )
        rows.append({
            "workers": workers, "predicted": predicted, "fingerprint": result.fingerprint[:16],
            "measured": BATCH / result.samples_per_second, "used": used["peak"] - loaded,
            "memory": sum(explained.decision.ranked[number].prediction.memory.values()),
        })  # fmt: skip
    best = min(rows, key=lambda row: row["measured"])
    own = next(r for r in rows if r["workers"] == dict(chosen.prediction.candidate.workers))
    return {
        "model": args.model, "cold": cold, "rows": rows, "best": best, "chosen": own,
    }  # fmt: skip


@contextlib.contextmanager
def _agents(args: argparse.Namespace, name: str) -> Iterator[Any]:
    """The agents of the other host; None where there is no network."""
    if not args.network:
        yield None
        return
    from tests.support.agents_on_loopback import Agents
    from tests.support.tls_hosts import Cluster

    folder = Path(args.folder) / f"{name}-{time.monotonic_ns()}"
    folder.mkdir()
    agents = Agents(Cluster(folder), {"host-1": 1}, 1, Network(2, args.network))
    yield agents
    agents.wait(30.0)


def _loaded(task: str, settings: Mapping[str, Any]) -> int:
    """The memory of the processes of a job that has loaded its task, and nothing else."""
    from lockstep.coordinator.open_hosts import open_hosts
    from lockstep.job.run_request import RunRequest

    given = {name: value for name, value in settings.items() if name not in ("args", "quiet")}
    with open_hosts(RunRequest.of(task, settings["args"], given), None):
        return process.pss(process.descendants(os.getpid())) or 0


@contextlib.contextmanager
def _memory() -> Iterator[dict[str, int]]:
    """The most memory that this process's descendants have together."""
    found, ended = {"peak": 0}, threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            used = process.pss(process.descendants(os.getpid()))
            found["peak"] = max(found["peak"], used or 0)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def ask(model: str, place: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A row: in a process of its own, on hosts of its own where the place has some."""
    command = [sys.executable, "-m", "benchmarks.planner", "member", "--models", model,
               "--seconds", str(args.seconds), "--folder", str(folder)]  # fmt: skip
    with contextlib.ExitStack() as stack:
        if place != "here":
            network = stack.enter_context(Network(2))
            network.limit(place)
            command = network.within(0, [*command, "--network", network.name])
        environment = {**process.environment(), "XDG_CACHE_HOME": str(folder / "cache")}
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
            env=environment,
            check=True,
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "place": place}


def row_of(found: Mapping[str, Any]) -> list[str]:
    """A row of the table."""
    best, own = found["best"], found["chosen"]
    lost = own["measured"] / best["measured"] - 1
    error = own["predicted"] / own["measured"] - 1
    memory = "-"
    if found["place"] == "here" and own["used"] > 0:
        memory = f"{own['memory'] / own['used'] - 1:+.0%}"
    same = len({row["fingerprint"] for row in found["rows"]}) == 1
    return [
        found["model"], found["place"], _named(own["workers"]), _named(best["workers"]),
        f"{lost:.0%}", f"{own['predicted'] * 1e3:.3g}", f"{own['measured'] * 1e3:.3g}",
        f"{error:+.0%}", memory, f"{found['cold']:.1f}", "yes" if same else "NO",
    ]  # fmt: skip


def _named(workers: Mapping[str, int]) -> str:
    counts = list(workers.values())
    return "+".join(map(str, counts))


def within(found: list[dict[str, Any]]) -> str:
    """How many rows are as good as asked for."""
    choices = sum(
        r["chosen"]["measured"] <= r["best"]["measured"] * (1 + GOOD_CHOICE) for r in found
    )
    steps = sum(
        abs(r["chosen"]["predicted"] / r["chosen"]["measured"] - 1) <= GOOD_STEP for r in found
    )
    return (
        f"Of {len(found)} rows the choice is within {GOOD_CHOICE:.0%} of the best in {choices}, "
        f"the predicted step within {GOOD_STEP:.0%} of the measured one in {steps}."
    )


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["member"])
    parser.add_argument("--models", default=",".join((*OWN, *random_models.MODELS)))
    parser.add_argument("--places", default=",".join(PLACES))
    parser.add_argument("--seconds", type=float, default=4.0, help="of steps in each timed run")
    parser.add_argument("--folder", default="")
    parser.add_argument("--network", default="")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    args = parser.parse_args()
    if args.what == "member":
        args.model = args.models
        print(json.dumps(member(args)))
        return 0
    places = args.places.split(",")
    if any(place != "here" for place in places) and (why := namespaces.missing()):
        print(f"no hosts: {why}", file=sys.stderr)
        return 1
    found = []
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
        for model in args.models.split(","):
            for place in places:
                print(f"{model} at {place}", file=sys.stderr, flush=True)
                try:
                    found.append(ask(model, place, args, Path(folder)))
                except (subprocess.SubprocessError, OSError) as error:
                    print(f"  failed: {error}", file=sys.stderr)
                    continue
                print("  " + "  ".join(row_of(found[-1])), file=sys.stderr, flush=True)
    head = ["model", "place", "chosen", "best", "lost", "predicted ms", "measured ms", "error",
            "memory", "planned s", "same bits"]  # fmt: skip
    print(report.table(head, [row_of(each) for each in found]))
    print(f"\nLoad per core: {process.load():.1f}. {within(found)}")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1))
    return 0 if len(found) == len(args.models.split(",")) * len(places) else 1


if __name__ == "__main__":
    sys.exit(main())
