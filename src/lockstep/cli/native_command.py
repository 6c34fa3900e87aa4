"""Native command: `lockstep build-native`, once on each machine."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lockstep.cli.shared_options import Quiet

Again = Annotated[bool, typer.Option("--again", help="Build it also where it is there already.")]


def build_native(again: Again = False, quiet: Quiet = False) -> None:
    """Build the parts of a step that need no interpreter: small models then train faster.

    It takes g++, or the compiler that CXX names, and half a minute. No bit depends on it.
    """
    from lockstep.native.build import build

    def say(text: str) -> None:
        if not quiet:
            print(f"lockstep  {text}", file=sys.stderr)

    print(build(say, again=again))
