"""Task help: `lockstep run RECIPE --help` lists the recipe's options before the settings."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from lockstep import recipes
from lockstep.cli.task_options import options_of

GIVEN = "lockstep.cli.task_help"
"""Where a context keeps the words of the command line. Some versions of typer have a copy of click
inside, so that the types of contexts have no name here."""


class CommandOfTask(TyperCommand):
    """Command whose help names the options of the recipe or task that is given with it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep the words first: `--help` is acted upon before the job is known."""
        ctx.meta[GIVEN] = list(args)
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The command's own help, then the options of the recipe or task."""
        super().format_help(ctx, formatter)
        known = recipes.names()
        given = ctx.meta.get(GIVEN, [])
        task = next((word for word in given if word in known or ".py:" in word), None)
        options = options_of(task) if task else None
        if task is None or options is None or options.options is None:
            return
        print(f"Options of {options.task}:\n")
        for name, option in options.options.items():
            default = "required" if option.default is None else f"default: {option.default}"
            kind = option.annotation.replace(" | None", "")
            print(f"  --{name.replace('_', '-')} {kind}".ljust(26) + f"{option.help} [{default}]")
        print()
