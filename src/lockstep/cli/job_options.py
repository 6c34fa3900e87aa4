"""Job options: the command line's option for each setting of a job."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lockstep.job.job import SETTINGS
from lockstep.job.settings import Setting

Workers = Annotated[int | None, typer.Option("--workers", "-w", help="Worker processes.")]
"""For commands that take no other setting; the default depends on the command."""

PANELS = {
    True: "Settings that the results depend on, bit for bit",
    False: "Settings that they do not depend on",
}
"""Headings in the help, by `changes_numbers`."""


def option_of(setting: Setting) -> Any:
    """The annotation that makes a parameter the option of a setting."""
    declared = setting.declared
    option = typer.Option(
        *(declared.options or ()),
        help=_help(setting),
        rich_help_panel=PANELS[declared.changes_numbers],
    )
    return Annotated[setting.kind.option | None, option]


def _help(setting: Setting) -> str:
    default = setting.default_text
    parts = [
        setting.declared.help,
        f"One of {', '.join(setting.choices)}." if setting.choices else "",
        "May be repeated." if setting.kind.option == list[str] else "",
        f"Default: {default}." if default and setting.kind.option is not bool else "",
    ]
    return re.sub(r"`([^`]*)`", _without_backticks, " ".join(part for part in parts if part))


def _without_backticks(quoted: re.Match[str]) -> str:
    name = quoted[1]
    return f"--{name.replace('_', '-')}" if name in SETTINGS else name


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each setting, in place of its `**settings`."""
    signature = inspect.signature(command, eval_str=True)
    own = list(signature.parameters.values())
    options = [each for each in own if each.kind is each.KEYWORD_ONLY]
    settings = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option_of(setting)
        )
        for name, setting in SETTINGS.items()
        if setting.declared.options is not None
    ]
    first = own[: own.index(options[0])]
    whole = signature.replace(parameters=[*first, *settings, *options])
    command.__signature__ = whole  # type: ignore[attr-defined]  # what typer looks at
    return command


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the command line gives; typer has None for the others."""
    return {name: value for name, value in settings.items() if value is not None}
