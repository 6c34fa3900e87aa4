"""What the command line says of a job: an option for each setting, and the recipe's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lockstep.errors import JobError

Workers = Annotated[int | None, typer.Option("--workers", "-w", help="Worker processes.")]

SETTINGS: dict[str, Any] = {
    "workers": Workers,
    "shards": Annotated[
        int | None, typer.Option(help="V: slices of each batch; the numbers' grain.")
    ],
    "threads": Annotated[int | None, typer.Option(help="Intra-op threads per worker.")],
    "data_epochs": Annotated[float | None, typer.Option(help="Passes over the training data.")],
    "steps": Annotated[
        int | None, typer.Option(help="Optimizer updates, instead of --data-epochs.")
    ],
    "batch_size": Annotated[int | None, typer.Option(help="Samples per step, over all workers.")],
    "local_steps": Annotated[int | None, typer.Option(help="Updates between two exchanges.")],
    "compression": Annotated[
        str | None, typer.Option(help="Of gradients between hosts: none, bf16, int8 or topk.")
    ],
    "groups": Annotated[
        int | None, typer.Option(help="With --compression: how many groups of shards.")
    ],
    "ownership": Annotated[
        str | None, typer.Option(help="Between hosts: replicated, sharded or servers.")
    ],
    "servers": Annotated[
        list[str] | None, typer.Option("--server", help="A host that is a server; give it again.")
    ],
    "seed": Annotated[int | None, typer.Option(help="Seed of everything.")],
    "eval_batch_size": Annotated[int | None, typer.Option(help="Samples per held-out batch.")],
    "max_workers": Annotated[int | None, typer.Option(help="How far `scale` may go.")],
    "clip_grad_norm": Annotated[float | None, typer.Option(help="Limit of the gradient's norm.")],
    "precision": Annotated[str | None, typer.Option(help="fp32 or bf16.")],
    "numerics": Annotated[str | None, typer.Option(help="native or portable.")],
    "loaders": Annotated[int | None, typer.Option(help="Loader processes per worker.")],
    "checkpoint_steps": Annotated[int | None, typer.Option(help="Checkpoint every N steps.")],
    "checkpoint_seconds": Annotated[float | None, typer.Option(help="... or seconds.")],
    "audit": Annotated[float | None, typer.Option(help="Fraction computed twice, 0 to 1.")],
    "stall_seconds": Annotated[float | None, typer.Option(help="Replace a silent worker.")],
    "host_seconds": Annotated[float | None, typer.Option(help="Give a silent host up.")],
    "data": Annotated[
        str | None, typer.Option("--host-data", help="Data on other hosts: build, ship or local.")
    ],
    "ship_code": Annotated[
        bool | None, typer.Option("--ship-code", help="Send the task's code to the other hosts.")
    ],
    "out": Annotated[str | None, typer.Option(help="The run folder; must not exist.")],
}
"""By the setting's name: its type, and how the option is called and explained."""


def takes_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of all settings, in the place of its `**settings`. None of those
    that are not given has a value."""
    signature = inspect.signature(command, eval_str=True)
    own = list(signature.parameters.values())
    options = [each for each in own if each.kind is each.KEYWORD_ONLY]
    settings = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in SETTINGS.items()
    ]
    first = own[: own.index(options[0])]
    whole = signature.replace(parameters=[*first, *settings, *options])
    command.__signature__ = whole  # type: ignore[attr-defined]  # what typer looks at
    return command


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that the command line gives."""
    return {name: value for name, value in settings.items() if value is not None}


def arguments(extra: list[str]) -> dict[str, Any]:
    """`--model cnn --wide` as `{"model": "cnn", "wide": True}`."""
    found: dict[str, Any] = {}
    pending: str | None = None
    for item in extra:
        if item.startswith("--"):
            name, equals, value = item[2:].partition("=")
            pending = name.replace("-", "_")
            found[pending] = _value(value) if equals else True
            pending = None if equals else pending
        elif pending is not None:
            found[pending] = _value(item)
            pending = None
        else:
            raise JobError(f"unexpected argument {item!r}", expected="--name value")
    return found


def _value(text: str) -> Any:
    """A number, a YAML value such as `[1, 2]` or `true`, or else the text itself."""
    import yaml

    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text
