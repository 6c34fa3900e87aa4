"""Two hosts: Lockstep under TLS beside DistributedDataParallel on gloo, which is not encrypted.

    python -m benchmarks.hosts --rates none,1gbit,100mbit --write docs/hosts.md

Hosts are network namespaces, with one worker of one thread each. Repetitions are interleaved. Needs
root and iproute2.
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

from benchmarks import namespaces
from benchmarks.namespaces import Network
from lockstep.net.transport import Report, ignore

MODELS = ("softmax", "mlp", "cnn", "transformer", "embedding")
LARGE = "large"
LIMIT = 400.0
AGENT = """
import json, sys
from pathlib import Path
from lockstep.agent import serve
from lockstep.net.identity import Identity
from lockstep.offer import Offer
from lockstep.processes import die_with_parent
die_with_parent(int(sys.argv[3]))
offer = Offer.from_message(json.load(sys.stdin))
serve(Identity.load(Path(sys.argv[1])), offer, workers=1, host=sys.argv[2], report=print)
"""


class Launcher:
    """Starts the second host's agent in its namespace."""

    def __init__(self, folder: Path, host: str, peer: str, enter: list[str]) -> None:
        from lockstep.net.identity import Identity

        self.identity = Identity.load(folder / "one")
        self.host = host
        self.workers: int | None = 1
        self.report: Report = ignore
        self._folder, self._peer, self._enter = folder, peer, enter
        self.process: subprocess.Popen[bytes] | None = None

    def offer(self, offer: Any) -> tuple[str, ...]:
        self.process = subprocess.Popen(
            [*self._enter, sys.executable, "-c", AGENT, str(self._folder / "two"), self._peer,
             str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdin is not None
        with self.process.stdin as pipe:
            pipe.write(json.dumps(offer.to_message()).encode())
        return ("two",)

    def close(self) -> None:
        pass


def make_identities(folder: Path) -> None:
    """A CA, and certificates for both hosts."""
    from lockstep.net.authority import Authority, make_request, store

    authority = Authority.open(folder / "authority")
    for name in ("one", "two"):
        signed = authority.sign(make_request(folder / name, name))
        store(folder / name, signed, authority.certificate)


def member_lockstep(args: argparse.Namespace) -> dict[str, Any]:
    """The master of a run on two hosts."""
    import lockstep
    from benchmarks import models

    folder = Path(args.folder)
    launcher = Launcher(folder, args.host, args.peer, json.loads(args.enter))
    batch = models.find(args.model).batch * models.WORLD
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as out:
        result = lockstep.run(
            "benchmarks.tasks:Benchmark",
            args={"name": args.model},
            on=launcher,
            steps=args.steps,
            local_steps=args.local_steps,
            batch_size=batch,
            workers=2,
            shards=2,
            threads=1,
            evaluate=False,
            quiet=True,
            out=f"{out}/run",
        )
    assert launcher.process is not None
    launcher.process.wait(30)
    return {"rate": result.samples_per_second, "fingerprint": result.fingerprint}


def member_ddp(args: argparse.Namespace) -> dict[str, Any]:
    """One of DDP's two processes."""
    from benchmarks.peers import contend

    os.environ["BENCHMARK_MEET"] = f"{args.folder}/meet-{args.token}"
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    timed = contend("ddp", args.model, args.seconds, None, args.rank)
    return {"rate": 2 * timed["samples"] / timed["seconds"], "steps": timed["steps"]}


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
    network: Network, folder: Path, model: str, steps: int, local_steps: int
) -> dict[str, Any]:
    """Samples per second and bytes per batch of Lockstep."""
    sent = network.sent(1)
    process = _member(
        network, 0, "lockstep", model, "--steps", str(steps),
        "--local-steps", str(local_steps), "--folder", str(folder),
        "--host", network.address(0), "--peer", network.address(1),
        "--enter", json.dumps(network.within(1, [])),
    )  # fmt: skip
    found = _answer(process)
    return {**found, "bytes": (network.sent(1) - sent) / steps / local_steps}


def ddp_once(network: Network, folder: Path, model: str, seconds: float) -> dict[str, Any]:
    """Samples per second of DDP, of the slower of its two processes."""
    token = str(time.monotonic_ns())
    both = [
        _member(
            network, rank, "ddp", model, "--rank", str(rank), "--seconds", str(seconds),
            "--folder", str(folder), "--token", token,
        )
        for rank in range(2)
    ]  # fmt: skip
    found = [_answer(process) for process in both]
    return min(found, key=lambda each: each["rate"])


def gradient_bytes(model: str) -> int:
    """Bytes of a gradient."""
    from benchmarks import models

    return sum(p.numel() * p.element_size() for p in models.find(model).model().parameters())


def compare(
    network: Network, folder: Path, model: str, repeats: int, seconds: float, local_steps: int
) -> dict[str, Any]:
    """Medians of interleaved repetitions."""
    first = ddp_once(network, folder, model, seconds / 2)
    from benchmarks.models import find

    steps = max(20, int(seconds * first["rate"] / (2 * find(model).batch)))
    if local_steps > 1:
        steps = 3
    rates: dict[str, list[float]] = {"lockstep": [], "ddp": []}
    wire = []
    for _ in range(repeats):
        found = lockstep_once(network, folder, model, steps, local_steps)
        rates["lockstep"].append(found["rate"])
        wire.append(found["bytes"])
        rates["ddp"].append(ddp_once(network, folder, model, seconds)["rate"])
    ratios = [ours / theirs for ours, theirs in zip(rates["lockstep"], rates["ddp"], strict=True)]
    return {
        "model": model,
        "lockstep": statistics.median(rates["lockstep"]),
        "ddp": statistics.median(rates["ddp"]),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "bytes": statistics.median(wire),
        "gradient": gradient_bytes(model),
    }


def table(rows: list[tuple[str, dict[str, Any]]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| link | model | Lockstep, TLS | DDP, gloo | ratio | range | bytes a step and host | "
        "of the gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate, row in rows:
        lines.append(
            f"| {rate} | {row['model']} | {row['lockstep']:,.0f} | {row['ddp']:,.0f} | "
            f"{row['ratio']:.2f} | {row['least']:.2f} to {row['most']:.2f} | "
            f"{row['bytes']:,.0f} | {row['bytes'] / row['gradient']:.3f} |"
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
    parser.add_argument("--write", type=Path)
    for name in ("folder", "host", "peer", "enter", "token"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.command == "member":
        member = member_lockstep if args.kind == "lockstep" else member_ddp
        print(json.dumps(member(args)), flush=True)
        return 0
    why = namespaces.missing()
    if why:
        print(f"not measured: {why}", file=sys.stderr)
        return 1
    rows: list[tuple[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as name, Network(2) as network:
        folder = Path(name)
        make_identities(folder)
        for rate in args.rates.split(","):
            if rate != "none":
                network.limit(rate)
            for model in args.models.split(","):
                row = compare(network, folder, model, args.repeats, args.seconds, args.local_steps)
                rows.append((rate, row))
                print(table([rows[-1]]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if args.write:
        args.write.write_text(f"{table(rows)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
