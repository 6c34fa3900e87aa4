"""The commands that work on the folder of a run: resume, scale, stop, verify, evaluate, ..."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from lockstep.cli import cluster_commands as commands
from lockstep.cli.job_options import Workers
from lockstep.cli.output import show_metrics, show_notes, show_result
from lockstep.cli.shared_options import WITH_ARGS, Json, On, Quiet, launcher_of
from lockstep.cli.task_options import options_of
from lockstep.cli.watch_commands import Dashboard, page_beside
from lockstep.errors import JobError

Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run the code that the folder names, though it is not your run."),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu or cpu-apart, where the run began on the other: the same numbers."),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(help="best, by the run's --monitor, or a checkpoint's name or step."),
]


def add_to(app: typer.Typer) -> None:
    """Make the commands part of an application."""
    for command in (resume, scale, stop, verify, evaluate, predict, report, play):
        app.command(context_settings=WITH_ARGS if command is evaluate else None)(command)


def resume(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    workers: Workers = None,
    device: Device = None,
    team: Annotated[
        int | None,
        typer.Option("--team", help="With slices: workers that compute a shard together."),
    ] = None,
    on: On = None,
    state: commands.StateOption = None,
    trust: Trust = False,
    dashboard: Dashboard = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Resume a run that was stopped or killed. The result is the same."""
    from lockstep.api.training import resume as resume_run

    with launcher_of(on, state) as launcher, page_beside(dashboard) as control:
        result = resume_run(
            run, workers=workers, device=device, team=team, quiet=quiet, on=launcher,
            control=control, trust=trust,
        )  # fmt: skip
    show_result(result, as_json)


def scale(
    run: Annotated[Path, typer.Argument(help="The folder of a running job.")],
    workers: Annotated[int, typer.Option("--workers", "-w", help="Worker processes wanted.")],
) -> None:
    """Change the number of workers of a running job. The result stays the same."""
    from lockstep.coordinator.run_control import ask

    answer = ask(run, "scale", workers)
    print(f"workers      {workers} wanted, of at most {answer.max_workers}")


def stop(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Stop a running job after its current step, with a checkpoint to resume from."""
    from lockstep.coordinator.run_control import ask

    ask(run, "stop")


def verify(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    steps: Annotated[str, typer.Option(help="The steps to replay, A:B; default: all.")] = ":",
    workers: Workers = None,
    trust: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Replay steps of a run, and compare them with its ledger."""
    from lockstep.api.verification import parse_steps, to_json
    from lockstep.api.verification import verify as verify_run

    found = verify_run(run, steps=parse_steps(steps), workers=workers, quiet=quiet, trust=trust)
    if as_json:
        print(to_json(found))
        return
    show_notes(found.notes)
    count = "1 worker" if found.workers == 1 else f"{found.workers} workers"
    print(f"verified     steps {found.first}:{found.last} on {count}, from {found.start}")
    if found.final:
        print("             and the final fingerprint")


def evaluate(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    workers: Workers = None,
    on: On = None,
    state: commands.StateOption = None,
    trust: Trust = False,
    checkpoint: Checkpoint = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Evaluate a run's model on held-out data. Other --options change the task's arguments."""
    from lockstep.api.evaluation import evaluate as evaluate_run
    from lockstep.results.manifest import check_trusted
    from lockstep.results.run_folder import RunFolder
    from lockstep.system.json_files import plain

    manifest = RunFolder.open(run).read_manifest()
    if not trust:
        check_trusted(manifest, run)  # to look for its options is to import the packages around it
    args = options_of(manifest["source"]["name"]).read(ctx.args)
    with launcher_of(on, state) as launcher:
        found = evaluate_run(
            run, workers=workers, args=args, on=launcher, quiet=quiet, trust=trust,
            checkpoint=checkpoint,
        )  # fmt: skip
    show_notes(found.notes)
    if as_json:
        print(json.dumps(plain(dataclasses.asdict(found))))
        return
    show_metrics(found.metrics, found.baseline)
    print(f"samples      {found.samples}, with the model after step {found.step}")


def predict(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: Annotated[Path, typer.Argument(help="JSON lines, *.csv, *.tsv or *.parquet.")],
    out: Annotated[Path, typer.Option(help="The file to write, in the order of the records.")],
    keep: Annotated[
        list[str] | None, typer.Option(help="Columns to copy, such as id,text. May be repeated.")
    ] = None,
    workers: Workers = None,
    batch_size: Annotated[int | None, typer.Option(help="Records per batch.")] = None,
    on: On = None,
    state: commands.StateOption = None,
    trust: Trust = False,
    checkpoint: Checkpoint = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Predict from a file of records. The same command resumes an interrupted prediction."""
    from lockstep.api.prediction import predict as predict_run

    if str(out) == "-":
        raise JobError(
            "predict writes to a file, so that it can be resumed",
            expected="a name, such as rows.jsonl or rows.parquet",
            found="--out -",
        )
    columns = [name for names in keep or () for name in names.split(",") if name]
    with launcher_of(on, state) as launcher:
        found = predict_run(
            run, data, out=out, keep=columns, workers=workers, batch_size=batch_size, quiet=quiet,
            on=launcher, trust=trust, checkpoint=checkpoint,
        )  # fmt: skip
    show_notes(found.notes)
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "out": str(found.out)}))
        return
    before = f", {found.resumed_at:,} of them before" if found.resumed_at else ""
    print(f"predicted    {found.records:,} records{before}, in {found.seconds:.1f} s")
    print(f"file         {found.out}")


def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write a run's report.html anew."""
    from lockstep.results.report import write_report
    from lockstep.results.run_folder import RunFolder

    print(write_report(RunFolder.open(run).path))


def play(
    run: Annotated[Path, typer.Argument(help="A finished run of the recipe game.")],
    second: Annotated[
        bool, typer.Option("--second", help="Play second: the network begins.")
    ] = False,
    itself: Annotated[
        bool, typer.Option("--self", help="Let the network play against itself.")
    ] = False,
    simulations: Annotated[
        int, typer.Option(min=1, help="Positions that the search evaluates per move.")
    ] = 128,
) -> None:
    """Play Connect Four against a trained network."""
    from lockstep.recipes.connect_four import terminal

    terminal.start(run, second=second, itself=itself, simulations=simulations)
