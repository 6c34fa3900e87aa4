"""Main: the commands `run`, `plan`, `doctor` and `data`, and how errors end a command."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import lockstep
from lockstep.cli import cluster_commands as commands
from lockstep.cli import run_folder_commands, watch_commands
from lockstep.cli.job_options import given, takes_settings
from lockstep.cli.native_command import build_native
from lockstep.cli.output import show_cuts, show_result
from lockstep.cli.rank_command import rank, read_job
from lockstep.cli.shared_options import WITH_ARGS, Json, On, Quiet, launcher_of
from lockstep.cli.task_help import CommandOfTask
from lockstep.cli.task_options import options_of
from lockstep.cli.watch_commands import Dashboard, page_beside
from lockstep.errors import LockstepError
from lockstep.job.task_resolution import check_file
from lockstep.system.folders import working_folder

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(no_args_is_help=True, help="Data sets of the recipes.")
app.add_typer(data_app, name="data")

INTERRUPTED = 130
SHOWN_IF_SET = {
    "groups", "servers", "faults", "holdings", "part", "monitor", "stop_patience", "stop_min_delta",
    "slice_plan", "sample_order",
}  # fmt: skip
"""Fields of a plan that most jobs leave empty."""
JobArgument = Annotated[
    str, typer.Argument(help="A recipe, module:Task, file.py:Task, or a job file (YAML).")
]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"lockstep {lockstep.__version__}, torch {version('torch')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show versions, and end."),
    ] = False,
) -> None:
    """Your PyTorch job on many workers, with the same bits as on one."""


@app.command(context_settings=WITH_ARGS, cls=CommandOfTask)
@takes_settings
def run(
    ctx: typer.Context,
    job: JobArgument,
    *,
    on: On = None,
    state: commands.StateOption = None,
    dashboard: Dashboard = False,
    quiet: Quiet = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train a job. Other --options are arguments of the recipe or task: --model cnn."""
    from lockstep.api.training import run as run_job

    with launcher_of(on, state) as launcher, page_beside(dashboard) as control:
        result = run_job(
            *_job(job, ctx.args), quiet=quiet, on=launcher, control=control, **given(settings)
        )
    show_result(result, as_json)


@app.command(context_settings=WITH_ARGS, cls=CommandOfTask)
@takes_settings
def plan(
    ctx: typer.Context,
    job: JobArgument,
    *,
    on: On = None,
    state: commands.StateOption = None,
    measure: Annotated[
        int, typer.Option("--measure", min=0, help="Time so many of the best, in short trials.")
    ] = 2,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Also try settings that change the numbers; none is chosen."),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Show the plan that `run` would make with the same options, and what else was considered."""
    from lockstep.api.training import explain
    from lockstep.cli.plan_tables import ranking_message, show_ranking

    with launcher_of(on, state) as launcher:
        explanation = explain(
            *_job(job, ctx.args), on=launcher, measure=measure, tune=tune, quiet=quiet,
            **given(settings),
        )  # fmt: skip
    found = explanation.decision.plan
    message = found.to_message()
    if as_json:
        print(json.dumps({**message, "ranking": ranking_message(explanation)}))
        return
    reasons, cuts = message.pop("reasons"), message.pop("cuts")
    if found.monitor is None:
        del message["monitor_mode"]
    if found.team == 1:
        del message["team"]
    for name, value in message.items():
        if value or name not in SHOWN_IF_SET:
            print(f"{name:<16} {'-' if value is None else value}")
    print("\nbecause")
    for reason in reasons:
        print(f"  {reason}")
    if cuts:
        show_cuts(cuts)
    show_ranking(explanation)


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


run_folder_commands.add_to(app)
watch_commands.add_to(app)
commands.add_to(app)
app.command()(rank)
app.command("build-native")(build_native)


def _job(name: str, extra: list[str]) -> tuple[Any]:
    """The job that the command line names, with the recipe's arguments."""
    job = read_job(name)
    where, colon, _ = str(job.task).rpartition(":")
    if colon and where.endswith(".py"):
        check_file(Path(working_folder(), where))
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
