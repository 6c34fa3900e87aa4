"""From raw rates to ratios, verdicts and the page `docs/benchmarks.md`. Pure: no clock, no I/O.

A ratio is taken within each repetition, between runs minutes apart at most, and the median of
these is reported with the least and the greatest: a machine that slows down for a while then
spoils a pair, not the comparison.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

Rates = Mapping[str, Sequence[float | None]]
"""Samples per second by contender; one entry per repetition, None where it failed."""

OURS = (
    "lockstep", "lockstep_compiled", "ddp", "ddp_malloc", "nosync", "meet", "threads", "compiled",
    "auto",
)  # fmt: skip
"""The contenders that run on PyTorch."""
FRAMEWORKS = ("tensorflow", "jax")
"""Those that run in an environment of their own (see `benchmarks.frameworks`)."""
CONTENDERS = (*OURS, *FRAMEWORKS)
MODELS: dict[str, str] = {
    "softmax": "softmax regression, 784→10, 64 samples per worker",
    "mlp": "MLP, 784→512→512→10, 64 samples per worker",
    "cnn": "CNN, 1→16→32 convolutions and two linear layers, 32 samples per worker",
    "transformer": "transformer, two layers of width 128 over 64 tokens, 16 samples per worker",
    "embedding": "embedding, 200,000x32 and a small MLP, 8 features, 256 samples per worker",
    "sparse": "the same, 1,000,000x64, with sparse gradients and SparseAdam",
}
DDP_BARS = {
    "softmax": 4.0, "mlp": 1.8, "cnn": 1.5, "transformer": 1.1, "embedding": 2.5, "sparse": 10.0,
}  # fmt: skip
NOSYNC_BAR = 0.9
ONE_PROCESS_BAR = 1.0
"""For the best of the contenders that are one process of PyTorch, and for TensorFlow."""
AUTO_BAR = 0.97
ALONE = ("threads", "compiled")
"""One process of PyTorch, with all cores."""
NOT_COMPILED = ("embedding", "sparse")
"""Models that Lockstep does not compile: their tables have gradients of their own form."""
NOT_OF_FRAMEWORKS = ("sparse",)
"""Models that the other frameworks have no equal of."""
DDP = ("ddp", "ddp_malloc")
"""DistributedDataParallel as users run it, and with Lockstep's settings of malloc; the one with the
better median stands for it."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Of two contenders, over the repetitions that both finished."""

    middle: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One line of the table of ratios."""

    model: str
    what: str
    ratio: Ratio | None
    """None: no repetition has both."""
    bar: float | None
    """None: it is told, and there is no bar."""

    @property
    def verdict(self) -> str:
        """`pass`, `miss`, or `not measured`; a ratio equal to its bar passes."""
        if self.ratio is None:
            return "not measured"
        if self.bar is None:
            return "—"
        return "pass" if self.ratio.middle >= self.bar else "miss"


def typical(rates: Rates, contender: str) -> float | None:
    """The median rate of a contender; None if it never finished."""
    values = [value for value in rates.get(contender, ()) if value is not None]
    return median(values) if values else None


def best(rates: Rates, among: Sequence[str]) -> str | None:
    """The contender with the greatest median rate."""
    ranked = [(middle, name) for name in among if (middle := typical(rates, name)) is not None]
    return max(ranked)[1] if ranked else None


def pairwise(rates: Rates, over: str, under: str | None) -> Ratio | None:
    """The ratio of two contenders' rates, repetition by repetition."""
    ratios = [
        a / b
        for a, b in zip(rates.get(over, ()), rates.get(under or "", ()), strict=False)
        if a is not None and b is not None
    ]
    if not ratios:
        return None
    return Ratio(middle=median(ratios), low=min(ratios), high=max(ratios), pairs=len(ratios))


def compare(model: str, rates: Rates) -> list[Comparison]:
    """The ratios of a model, with their bars."""
    ddp = best(rates, DDP)
    alone = best(rates, ALONE)
    other = best(rates, ("lockstep", *DDP, "threads"))
    lines: list[tuple[str, Ratio | None, float | None]] = [
        (f"lockstep / {ddp or 'ddp'}", pairwise(rates, "lockstep", ddp), DDP_BARS[model]),
        ("lockstep / nosync", pairwise(rates, "lockstep", "nosync"), NOSYNC_BAR),
        ("lockstep / meet", pairwise(rates, "lockstep", "meet"), None),
        (f"lockstep / {alone or 'threads'}", pairwise(rates, "lockstep", alone), ONE_PROCESS_BAR),
        (f"auto / best other ({other or 'none'})", pairwise(rates, "auto", other), AUTO_BAR),
    ]
    if model not in NOT_OF_FRAMEWORKS:
        lines += [
            ("lockstep / tensorflow", pairwise(rates, "lockstep", "tensorflow"), ONE_PROCESS_BAR),
            ("lockstep / jax", pairwise(rates, "lockstep", "jax"), None),
        ]
    if model not in NOT_COMPILED:
        ratio = pairwise(rates, "lockstep_compiled", "jax")
        lines.append(("lockstep_compiled / jax", ratio, ONE_PROCESS_BAR))
    return [Comparison(model=model, what=what, ratio=ratio, bar=bar) for what, ratio, bar in lines]


def publish(text: str, place: Path | None) -> None:
    """Print a page, and write it where it belongs if asked."""
    print(text)
    if place is not None:
        place.write_text(text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rate(value: float | None) -> str:
    """A rate in a table; a dash if there is none."""
    return "—" if value is None else f"{value:,.0f}"


def _size(count: float) -> str:
    return f"{count / 2**20:,.1f}" if count < 10 * 2**20 else f"{count / 2**20:,.0f}"


def speed_tables(speed: Mapping[str, Any]) -> str:
    """Median rates, and the ratios with their bars."""
    rates = [
        [
            model,
            *(rate(typical(entry["rates"], name)) for name in CONTENDERS),
            _plans(entry.get("plans", [])),
        ]
        for model, entry in speed.items()
    ]
    ratios = [
        [line.model, line.what,
         *((f"{r.middle:.2f}", f"{r.low:.2f} to {r.high:.2f}", str(r.pairs)) if (r := line.ratio)
           else ("—", "—", "0")),
         "—" if line.bar is None else f"{line.bar:.2f}", line.verdict]
        for model, entry in speed.items()
        for line in compare(model, entry["rates"])
    ]  # fmt: skip
    return "\n\n".join(
        (
            table(("samples/s", *CONTENDERS, "plan of auto"), rates),
            table(
                ("model", "ratio", "median", "least to greatest", "pairs", "bar", "verdict"), ratios
            ),
        )
    )


def _plans(plans: Sequence[Mapping[str, int]]) -> str:
    """What `auto` chose: workers x threads, and how often if not always the same."""
    chosen = Counter(f"{p['workers']}x{p['threads']}, V={p['shards']}" for p in plans)
    if len(chosen) == 1:
        return next(iter(chosen))
    return "; ".join(f"{plan} ({count} times)" for plan, count in chosen.items()) or "—"


def memory_table(memory: Mapping[str, Any]) -> str:
    """PSS of each contender beside the sizes of what it has to hold, in MiB."""
    names = ("lockstep", "ddp", "threads")
    rows = [
        [model, *(_size(entry["sizes"][key]) for key in ("parameters", "gradients", "adam_state",
                                                        "data")),
         *(f"{_size(used['median'])} ({used['processes']})" if (used := entry["pss"].get(name))
           else "—" for name in names)]
        for model, entry in memory.items() if model != "idle"
    ]  # fmt: skip
    head = ("MiB", "parameters", "gradients", "Adam state", "data", *names)
    return table(head, rows)


def cold_table(cold: Mapping[str, Sequence[float]]) -> str:
    """Start-up times in seconds."""
    rows = [
        [what, f"{median(values):.3f}", f"{min(values):.3f} to {max(values):.3f}", str(len(values))]
        for what, values in cold.items()
        if values
    ]
    return table(("seconds", "median", "least to greatest", "times"), rows)


def page(results: Mapping[str, Any]) -> str:
    """The whole of `docs/benchmarks.md`."""
    machine, parts = results["machine"], [_INTRODUCTION]
    parts.append(
        f"**Machine**: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB; Linux {machine['kernel']}, Python {machine['python']}, "
        f"PyTorch {machine['torch']}."
    )
    if speed := results.get("speed"):
        entries = list(speed.values())
        parts += [
            "## Speed", _SPEED, speed_tables(speed), _conditions(speed),
            f"Repetitions: {entries[0]['repeats']}, of about {entries[0]['seconds']:g} s each. "
            + " ".join(f"`{name}`: {what}." for name, what in MODELS.items()),
            _bits(speed),
        ]  # fmt: skip
    if speed and (others := results.get("others")):
        parts += ["## Other machines", _OTHERS, _machines_table(results, others)]
    if memory := results.get("memory"):
        idle = memory.get("idle", {})
        parts += ["## Memory", _MEMORY]
        if idle:
            parts.append(
                "A process that has only imported torch: "
                f"{_size(idle['1'])} MiB alone, two together {_size(idle['2'])} MiB."
            )
        parts.append(memory_table(memory))
    if cold := results.get("cold"):
        parts += ["## Cold start", _COLD, cold_table(cold)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machines_table(results: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The median ratios on each machine, side by side."""
    columns = [
        {
            (line.model, line.what.split(" (")[0]): "—" if line.ratio is None
            else f"{line.ratio.middle:.2f}"
            for model, entry in each["speed"].items()
            for line in compare(model, entry["rates"])
        }
        for each in (results, *others)
    ]  # fmt: skip
    head = [_machine_head(each) for each in (results, *others)]
    rows = [
        [*key, *(column.get(key, "—") for column in columns)]
        for key in dict.fromkeys(key for column in columns for key in column)
    ]
    return table(("model", "ratio", *head), rows)


def _machine_head(results: Mapping[str, Any]) -> str:
    dates = [entry["date"][:10] for entry in results["speed"].values()]
    return f"{results['machine']['processor'].split(' (')[0]}, {max(dates)}"


def _conditions(speed: Mapping[str, Any]) -> str:
    """When each model was measured, and how quiet the machine was."""
    return "Measured: " + "; ".join(
        f"{model} {entry['date']}, load {entry['load']:.2f} at its start, "
        f"{100 * entry['steal']:.1f} % of processor time stolen by the hypervisor"
        for model, entry in speed.items()
    ) + "."  # fmt: skip


def _bits(speed: Mapping[str, Any]) -> str:
    """Whether equal runs gave equal bits."""
    found = {m: set(e["fingerprints"]) for m, e in speed.items() if e.get("fingerprints")}
    if not found:
        return ""
    differ = [model for model, prints in found.items() if len(prints) > 1]
    if differ:
        return f"**The repetitions of `lockstep` ended in different fingerprints: {differ}.**"
    return "All repetitions of `lockstep` on a model ended in the same fingerprint."


_INTRODUCTION = """\
<!-- Written by benchmarks/run.py; do not edit. -->
# Benchmarks

What a training step costs on one host, against the obvious alternatives. To measure again, on a
machine that does nothing else: `python -m benchmarks.run --write docs/benchmarks.md`. The raw
figures are in `benchmarks/results.json`."""

_SPEED = """\
All train the same model with `torch.optim.Adam(lr=1e-3, fused=True)`, the table of `sparse` with
`torch.optim.SparseAdam(lr=1e-3)`, and draw each batch by
`index_select` with a slice of a permutation of the same 8,192 samples in memory. Each
measurement has fresh processes; contenders take turns within a repetition, and the order turns
from one to the next. Start-up and warm-up are not counted.

- `lockstep`: 2 workers of 1 thread, V = 2, with the ledger and everything else that a run has, and
  `trace: always`: shards are traced in the first step, and not after 30 of them as by default.
- `lockstep_compiled`: the same with `compile: true`.
- `ddp`: `DistributedDataParallel` on gloo over loopback, 2 processes of 1 thread,
  `gradient_as_bucket_view=True`; `ddp_malloc`: the same with the settings of glibc's malloc that
  Lockstep gives its workers, so that what these do alone can be seen. The faster of the two
  stands for DDP in the ratios.
- `nosync`: two processes that never synchronise, with the same settings of malloc; the bound.
  What exactness and synchrony cost together is the ratio to it.
- `meet`: the same, but the two wait for each other after each backward pass and each update, with
  Lockstep's barrier, and exchange nothing: what synchrony alone costs on this machine.
- `threads`: one process of 2 threads on the batches of both workers; `compiled`: the same with
  `torch.compile` of the loss.
- `auto`: Lockstep with no settings but the batch size: V = 4, which two workers share. It is
  compared with the best of `lockstep`, `ddp` and `threads`; `nosync` and `meet` train two models,
  so they are no alternatives.
- `jax`: one process, `jit` of a step with optax's Adam and donated buffers; `tensorflow`: one
  process, a `tf.function` of 20 steps with Keras's Adam. Both use all cores; the models' shapes,
  the samples per step and the way of drawing are the same (`benchmarks/frameworks`)."""

_OTHERS = """\
The median ratios, side by side: machines of one kind differ too, and so do their days."""

_MEMORY = """\
PSS: resident memory of all processes of a contender together, shared pages counted once; the
median over the steady state, in MiB, with the number of processes. Nothing is subtracted: torch
itself and the data are in it (each process of `ddp` has its own copy of the data, as its users
have). `lockstep` includes its master and the processes that workers are forked from."""

_COLD = """\
`first step`: from the start of `python -m lockstep run mnist --workers 2` to the commit of the
first step. Imports: in a fresh process each, files cached."""
