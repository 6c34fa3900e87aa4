"""Main: the commands that work on jobs and runs. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lockstep.cli import cluster_commands as commands
from lockstep.cli.job_options import Workers, given, takes_settings
from lockstep.cli.rank_command import rank, read_job
from lockstep.cli.task_help import CommandOfTask
from lockstep.cli.task_options import options_of
from lockstep.errors import JobError, LockstepError, ResourceError, RunInterrupted

if TYPE_CHECKING:
    from lockstep.coordinator.launcher import Launcher
    from lockstep.results.result import Result

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Your PyTorch job on many workers, with the same bits as on one.",
)
data_app = typer.Typer(no_args_is_help=True, help="Data sets of the recipes.")
app.add_typer(data_app, name="data")

INTERRUPTED = 130
SHOWN_IF_SET = {"groups", "servers", "faults", "holdings", "part"}
"""Fields of a plan that most jobs leave empty."""
WITH_ARGS = {"allow_extra_args": True, "ignore_unknown_options": True}
JobArgument = Annotated[
    str, typer.Argument(help="A recipe, module:Task, file.py:Task, or a job file (YAML).")
]
On = Annotated[
    str | None,
    typer.Option(
        "--on", help="Run on other hosts too: up, ray, ray:ADDRESS, or a file with a join token."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Run the code that the folder names, though it is not your run."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


@app.command(context_settings=WITH_ARGS, cls=CommandOfTask)
@takes_settings
def run(
    ctx: typer.Context,
    job: JobArgument,
    *,
    on: On = None,
    state: commands.StateOption = None,
    quiet: Quiet = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train a job. Other --options are arguments of the recipe or task: --model cnn."""
    from lockstep.api.training import run as run_job

    with _launcher(on, state) as launcher:
        result = run_job(*_job(job, ctx.args), quiet=quiet, on=launcher, **given(settings))
    _show(result, as_json)


@contextlib.contextmanager
def _launcher(on: str | None, state: Path | None) -> Iterator[Launcher | None]:
    """The launcher that `--on` names, or None. An interruption within becomes an error, since typer
    would drop its message."""
    try:
        with contextlib.ExitStack() as stack:
            if on is None:
                yield None
                return
            from lockstep.cli.launchers import open_launcher

            yield stack.enter_context(open_launcher(on, state, commands.report))
    except RunInterrupted as interrupted:
        raise interrupted.stopped from None


def _show(result: Result, as_json: bool) -> None:
    """Print a result. The run has it whatever happens to stdout.

    Raises:
        ResourceError: stdout cannot be written to.
    """
    try:
        _print_result(result, as_json)
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # or Python tries to write the rest when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ResourceError(
            f"the result cannot be printed: {error}", fix=f"it is in {result.folder}/result.json"
        ) from error


def _print_result(result: Result, as_json: bool) -> None:
    from lockstep.planning.core_split import Division
    from lockstep.results.manifest import scope_of
    from lockstep.results.recoveries import summarise_recoveries
    from lockstep.results.run_folder import RunFolder

    if as_json:
        print(json.dumps(result.to_message()))
        return
    print(f"fingerprint  {result.fingerprint}")
    print(f"holds for    {scope_of(RunFolder.open(result.folder).read_manifest())}")
    _show_metrics(result.metrics, result.baseline)
    split = Division(workers=result.workers, threads=result.threads, shards=result.shards)
    print(f"plan         {split}")
    recovered = summarise_recoveries(result.recoveries)
    if recovered:
        print(f"recoveries   {recovered}")
    print(f"speed        {result.samples_per_second:,.0f} samples/s, {result.steps} steps")
    print(f"time         {result.wall_seconds:.1f} s, {result.startup_seconds:.1f} s to start")
    print(f"folder       {result.folder}")


def _show_metrics(metrics: Mapping[str, float], baseline: Mapping[str, float]) -> None:
    for name, value in metrics.items():
        beside = f"  (baseline {baseline[name]:.6g})" if name in baseline else ""
        print(f"{name:<12} {value:.6g}{beside}")


def _note(notes: Iterable[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


@app.command(context_settings=WITH_ARGS, cls=CommandOfTask)
@takes_settings
def plan(
    ctx: typer.Context,
    job: JobArgument,
    *,
    quiet: Quiet = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Show the plan that `run` would make with the same options, with its reasons."""
    from lockstep.api.training import plan as plan_job

    found = plan_job(*_job(job, ctx.args), quiet=quiet, **given(settings))
    message = found.to_message()
    if as_json:
        print(json.dumps(message))
        return
    reasons = message.pop("reasons")
    for name, value in message.items():
        if value or name not in SHOWN_IF_SET:
            print(f"{name:<16} {'-' if value is None else value}")
    print("\nbecause")
    for reason in reasons:
        print(f"  {reason}")


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    workers: Workers = None,
    on: On = None,
    state: commands.StateOption = None,
    trust: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Resume a run that was stopped or killed. The result is the same."""
    from lockstep.api.training import resume as resume_run

    with _launcher(on, state) as launcher:
        result = resume_run(run, workers=workers, quiet=quiet, on=launcher, trust=trust)
    _show(result, as_json)


@app.command()
def scale(
    run: Annotated[Path, typer.Argument(help="The folder of a running job.")],
    workers: Annotated[int, typer.Option("--workers", "-w", help="Worker processes wanted.")],
) -> None:
    """Change the number of workers of a running job. The result stays the same."""
    from lockstep.coordinator.run_control import ask

    answer = ask(run, "scale", workers)
    print(f"workers      {workers} wanted, of at most {answer.max_workers}")


@app.command()
def stop(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Stop a running job after its current step, with a checkpoint to resume from."""
    from lockstep.coordinator.run_control import ask

    ask(run, "stop")


@app.command()
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
    _note(found.notes)
    count = "1 worker" if found.workers == 1 else f"{found.workers} workers"
    print(f"verified     steps {found.first}:{found.last} on {count}, from {found.start}")
    if found.final:
        print("             and the final fingerprint")


@app.command(context_settings=WITH_ARGS)
def evaluate(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    workers: Workers = None,
    on: On = None,
    state: commands.StateOption = None,
    trust: Trust = False,
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
    with _launcher(on, state) as launcher:
        found = evaluate_run(run, workers=workers, args=args, on=launcher, quiet=quiet, trust=trust)
    _note(found.notes)
    if as_json:
        print(json.dumps(plain(dataclasses.asdict(found))))
        return
    _show_metrics(found.metrics, found.baseline)
    print(f"samples      {found.samples}, with the model after step {found.step}")


@app.command()
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
    with _launcher(on, state) as launcher:
        found = predict_run(
            run, data, out=out, keep=columns, workers=workers, batch_size=batch_size, quiet=quiet,
            on=launcher, trust=trust,
        )  # fmt: skip
    _note(found.notes)
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "out": str(found.out)}))
        return
    before = f", {found.resumed_at:,} of them before" if found.resumed_at else ""
    print(f"predicted    {found.records:,} records{before}, in {found.seconds:.1f} s")
    print(f"file         {found.out}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine's requirements, and that one and two workers compute the same bits."""
    from lockstep.cli.doctor import examine

    checks = examine()
    if as_json:
        print(json.dumps([vars(check) for check in checks]))
    else:
        for check in checks:
            print(f"{'ok  ' if check.good else 'FAIL'} {check.name:<14} {check.found}")
    if not all(check.good for check in checks):
        raise typer.Exit(1)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write a run's report.html anew."""
    from lockstep.results.report import write_report
    from lockstep.results.run_folder import RunFolder

    print(write_report(RunFolder.open(run).path))


@app.command()
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


@data_app.command()
def fetch(name: Annotated[str, typer.Argument(help="A data set, such as mnist.")]) -> None:
    """Fetch a data set into the cache, and print its folder."""
    from lockstep.recipes.datasets import fetch as fetch_data

    print(fetch_data(name))


@data_app.command("list")
def list_data(as_json: Json = False) -> None:
    """List the data sets, and which of them are on this machine."""
    from lockstep.recipes.datasets import DATA_SETS

    rows = [
        {"name": each.name, "where": each.where(), "about": each.about, "licence": each.licence}
        for each in DATA_SETS
    ]
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['name']:<15} {row['where']:<10} {row['about']} ({row['licence']})")


commands.add_to(app)
app.command()(rank)


def _job(name: str, extra: list[str]) -> tuple[Any]:
    """The job that the command line names, with the recipe's arguments."""
    job = read_job(name)
    options = options_of(str(job.task))
    options.check(job.args)
    return (job.replace_args({**job.args, **options.read(extra)}),)


def main() -> None:
    """Entry point of the `lockstep` command."""
    guarded(app)


def guarded(command: Callable[[], None]) -> None:
    """Run a command; errors become a message on stderr and an exit code."""
    try:
        command()
    except LockstepError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("lockstep: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except SystemExit as leaving:
        if (
            leaving.code == INTERRUPTED
        ):  # newer versions of typer turn Ctrl-C into this, without a message
            print("lockstep: interrupted", file=sys.stderr)
        raise
