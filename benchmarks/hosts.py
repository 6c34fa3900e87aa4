"""Hosts: Lockstep under TLS compared with DistributedDataParallel on gloo, unencrypted.

    python -m benchmarks.hosts --rates none,1gbit,100mbit --write docs/hosts.md
    python -m benchmarks.hosts --rates none --delay 0.025

Hosts are network namespaces, with one worker of one thread each, and a core of its own where there
are as many; else all share all. Repetitions are interleaved. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import delays, namespaces
from benchmarks.namespaces import Network

MODELS = ("softmax", "mlp", "cnn", "transformer", "embedding")
LARGE = "large"
LIMIT = 400.0
FEW_STEPS = 2
"""What a run of so many sends is taken off: the state that hosts begin with is not a step's."""


def member_lockstep(args: argparse.Namespace) -> dict[str, Any]:
    """The master of a run on several hosts."""
    import lockstep
    from benchmarks import models
    from tests.support.agents_on_loopback import Agents
    from tests.support.tls_hosts import Cluster

    others = {f"host-{number}": 1 for number in range(1, args.hosts)}
    agents = Agents(Cluster(Path(args.folder)), others, 1, Network(args.hosts, args.network))
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as out:
        result = lockstep.run(
            "benchmarks.tasks:Benchmark",
            args={"name": args.model},
            on=agents,
            steps=args.steps,
            local_steps=args.local_steps,
            compression=args.compression,
            ownership=args.ownership,
            servers=["host-1"] if args.ownership == "servers" else (),
            batch_size=models.find(args.model).batch * args.hosts,
            workers=args.hosts - (args.ownership == "servers"),
            shards=args.hosts - (args.ownership == "servers"),
            threads=1,
            evaluate=False,
            quiet=True,
            out=f"{out}/run",
        )
    agents.wait(30.0)
    return {"rate": result.samples_per_second, "fingerprint": result.fingerprint}


def member_ddp(args: argparse.Namespace) -> dict[str, Any]:
    """One of DDP's processes, of which each host has one."""
    from benchmarks.peers import contend

    os.environ["BENCHMARK_MEET"] = f"{args.folder}/meet-{args.token}"
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    timed = contend("ddp", args.model, args.seconds, None, args.rank, world=args.hosts)
    return {"rate": args.hosts * timed["samples"] / timed["seconds"], "steps": timed["steps"]}


def _member(network: Network, host: int, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.hosts", "member", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{Path.cwd()}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(
        network.within(host, command), stdout=subprocess.PIPE, text=True, env=environment
    )


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    said, _ = process.communicate(timeout=LIMIT)
    if process.returncode:
        raise RuntimeError("a contender failed")
    found: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return found


def lockstep_once(
    network: Network, folder: Path, model: str, steps: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Samples per second of Lockstep, and the bytes that each host has sent."""
    sent = [network.sent(host) for host in range(network.hosts)]
    process = _member(
        network, 0, "lockstep", model, "--steps", str(steps),
        "--local-steps", str(args.local_steps), "--ownership", args.ownership,
        "--compression", args.compression,
        "--hosts", str(network.hosts), "--network", network.name, "--folder", str(folder),
    )  # fmt: skip
    found = _answer(process)
    return {**found, "sent": [network.sent(host) - before for host, before in enumerate(sent)]}


def ddp_once(network: Network, folder: Path, model: str, seconds: float) -> dict[str, Any]:
    """Samples per second of DDP, of the slowest of its processes."""
    token = str(time.monotonic_ns())
    processes = [
        _member(
            network, rank, "ddp", model, "--rank", str(rank), "--seconds", str(seconds),
            "--hosts", str(network.hosts), "--folder", str(folder), "--token", token,
        )
        for rank in range(network.hosts)
    ]  # fmt: skip
    found = [_answer(process) for process in processes]
    return min(found, key=lambda each: each["rate"])


def gradient_bytes(model: str) -> int:
    """Bytes of a gradient."""
    from benchmarks import models

    return sum(p.numel() * p.element_size() for p in models.find(model).model().parameters())


def compare(network: Network, folder: Path, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """Medians of interleaved repetitions."""
    from benchmarks.models import find

    first = ddp_once(network, folder, model, args.seconds / 2)
    steps = max(20, int(args.seconds * first["rate"] / (network.hosts * find(model).batch)))
    if args.local_steps > 1:
        steps = FEW_STEPS + 2
    beginning = lockstep_once(network, folder, model, FEW_STEPS, args)["sent"]
    rates: dict[str, list[float]] = {"lockstep": [], "ddp": []}
    wire = []
    for _ in range(args.repeats):
        found = lockstep_once(network, folder, model, steps, args)
        rates["lockstep"].append(found["rate"])
        most = max(now - then for now, then in zip(found["sent"], beginning, strict=True))
        wire.append(most / (steps - FEW_STEPS) / args.local_steps)
        rates["ddp"].append(ddp_once(network, folder, model, args.seconds)["rate"])
    ratios = [ours / theirs for ours, theirs in zip(rates["lockstep"], rates["ddp"], strict=True)]
    return {
        "model": model,
        "lockstep": statistics.median(rates["lockstep"]),
        "ddp": statistics.median(rates["ddp"]),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "bytes": statistics.median(wire),
        "ring": gradient_bytes(model) * 2 * (network.hosts - 1) / network.hosts,
    }


def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| link | model | Lockstep, TLS | DDP, gloo | ratio | range | bytes a step and host | "
        "of a ring's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate, row in rows:
        spread = f"{row['least']:.2f} to {row['most']:.2f}"
        beside = f"{row['ddp']:,.0f} | {row['ratio']:.2f} | {spread}"
        lines.append(
            f"| {rate} | {row['model']} | {row['lockstep']:,.0f} | {beside} | "
            f"{row['bytes']:,.0f} | {row['bytes'] / row['ring']:.3f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Measure as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", nargs="?", default="compare", choices=["compare", "member"])
    parser.add_argument("kind", nargs="?", choices=["lockstep", "ddp"])
    parser.add_argument("model", nargs="?", choices=[*MODELS, LARGE])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rates", default="none,1gbit,100mbit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--compression", default="none")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--delay", type=float, help="seconds that packets between hosts take")
    parser.add_argument("--ownership", default="replicated")
    parser.add_argument("--write", type=Path)
    for name in ("folder", "network", "token"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command == "member":
        member = member_lockstep if args.kind == "lockstep" else member_ddp
        print(json.dumps(member(args)), flush=True)
        return 0
    why = namespaces.missing() or (delays.missing() if args.delay is not None else "")
    if why:
        print(f"not measured: {why}", file=sys.stderr)
        return 1
    rows: list[tuple[str, dict[str, Any]]] = []
    with (
        tempfile.TemporaryDirectory(prefix="lockstep-bench-") as name,
        Network(args.hosts, delay=None if args.delay is None else args.delay / 2) as network,
    ):
        folder = Path(name)
        for rate in args.rates.split(","):
            if rate != "none":
                network.limit(rate)
            for model in args.models.split(","):
                row = compare(network, folder, model, args)
                rows.append((rate, row))
                print(table([rows[-1]]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if args.write:
        args.write.write_text(f"{table(rows)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
