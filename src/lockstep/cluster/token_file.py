"""Token files: join tokens in files and on stdin."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.errors import IdentityError

if TYPE_CHECKING:
    from lockstep.net.join_tokens import Token


MAX_TOKEN = 4096
"""Characters that are read of what should hold a token."""


PREFIX = "lockstep1-"


def read_token(source: str) -> Token:
    """The token in a file, or on stdin if the source is `-`; a terminal does not show it.

    Raises:
        IdentityError: there is none.
    """
    from lockstep.net.join_tokens import parse_token

    if source.strip().startswith(PREFIX):
        raise IdentityError(
            "a join token was given on the command line, where other users can see it",
            expected="the name of a file that holds it, or - for stdin",
            found="a token",
            fix="make a new one with: lockstep token --token-file FILE; then: lockstep join FILE, "
            "or: lockstep join - and paste it",
        )
    if source == "-":
        if sys.stdin.isatty():
            return parse_token(getpass.getpass("join token: "))
        return parse_token(sys.stdin.readline(MAX_TOKEN))
    try:
        with open(source) as file:
            return parse_token(file.read(MAX_TOKEN))
    except (OSError, UnicodeDecodeError) as error:
        raise IdentityError(
            f"the token file {source} cannot be read",
            expected="a file with one join token, or - for stdin",
            found=getattr(error, "strerror", None) or "it is not text",
            fix="where `lockstep up` runs: lockstep token --token-file FILE",
        ) from None


def write_tokens(path: Path, tokens: list[str]) -> None:
    """Write each token to a file of its own, with mode 0600; old tokens are replaced.

    Raises:
        IdentityError: there is another file in its place, or it cannot be written.
    """
    from lockstep.system.private_files import write_private

    numbered = [path.with_name(f"{path.name}-{number}") for number in range(1, len(tokens) + 1)]
    for each, text in zip([path] if len(tokens) == 1 else numbered, tokens, strict=True):
        try:
            if each.exists() and each.read_bytes().startswith(PREFIX.encode()):
                each.unlink()
            write_private(each, text.encode() + b"\n")
        except OSError as error:
            raise IdentityError(
                f"the token file {each} cannot be written",
                expected="a path where nothing is, or an older token",
                found=error.strerror or str(error),
            ) from None
