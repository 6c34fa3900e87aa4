"""One framework on one model: prints one JSON line of what it measured."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import time

from benchmarks.frameworks.shapes import MODELS

WARM_SHARE = 0.25
"""Of the measured time, before the clock starts."""


def measure(framework: str, name: str, seconds: float) -> dict[str, float]:
    """`rate` in samples per second, `steps` and `seconds`."""
    module = importlib.import_module(f"benchmarks.frameworks.{framework}_steps")
    run, finish, samples = module.make(name)
    clock = time.perf_counter
    run()
    first = finish()
    until = clock() + WARM_SHARE * seconds
    while clock() < until:
        run()
    finish()
    calls, began = 0, clock()
    while clock() - began < seconds:
        run()
        calls += 1
    last = finish()
    elapsed = clock() - began
    if not math.isfinite(last) or last in (0.0, first) or last > 2 * first:
        raise SystemExit(f"{framework} on {name} does not train: loss {first}, then {last}")
    steps = calls * samples // MODELS[name].batch
    return {"rate": calls * samples / elapsed, "steps": steps, "seconds": elapsed}


def main() -> None:
    """Measure as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("framework", choices=["jax", "tensorflow"])
    parser.add_argument("model", choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    print(json.dumps(measure(options.framework, options.model, options.seconds)), flush=True)


if __name__ == "__main__":
    main()
