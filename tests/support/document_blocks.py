"""Blocks of code in the documents: what each is, and which commands are in it.

A block says by its language what is done with it, and by an HTML comment before it what not:

    python, with a title      written to the page's folder under that name
    python                    run there
    console                   its lines after `$ ` are run there, in order
    yaml                      read as a job file; with a title, written as well
    text, mermaid             nothing: what is printed, or a picture. It has no commands
    <!-- not run: REASON -->  read only; the reason is listed
    <!-- in the background -->   of a console block: it goes on while the next are run; with
                              `, until: COMMAND` these wait until that one succeeds
    <!-- setup: CODE -->      Python that is run before the block, or a file's content for it

`python -m tests.support.document_blocks` lists what is not run, and why.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.file_tree import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("python", "console", "yaml")
SHOWN = ("text", "mermaid")
NOT_RUN, BACKGROUND, SETUP = "not run: ", "in the background", "setup: "
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>(?:(?!-->).)*?) ?-->\n)?"
    r'^```(?P<language>[\w]*)(?: title="(?P<title>[\w./-]+)")?\n(?P<text>.*?)^```$',
    re.DOTALL | re.MULTILINE,
)
SHELL_WORDS = ("|", "&&", ">", ";", "&", "2>", ">>")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Block: a fenced block of a page."""

    page: Path
    line: int
    language: str
    title: str
    text: str
    mark: str
    """The comment before it."""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def why_not(self) -> str:
        """Why it is not run; "": it is."""
        return self.mark.removeprefix(NOT_RUN) if self.mark.startswith(NOT_RUN) else ""

    @property
    def setup(self) -> str:
        """Code that is run before it."""
        return self.mark.removeprefix(SETUP) if self.mark.startswith(SETUP) else ""

    @property
    def background(self) -> bool:
        return self.mark.startswith(BACKGROUND)

    @property
    def until(self) -> str:
        """A command that succeeds once what goes on in the background is ready."""
        return self.mark.partition("until: ")[2] if self.background else ""

    @property
    def is_run(self) -> bool:
        return self.language in RUN and not self.why_not

    def commands(self) -> list[str]:
        """The commands of a console block, those over several lines as one."""
        joined = self.text.replace("\\\n", " ")
        return [line.removeprefix("$ ") for line in joined.splitlines() if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(
            page=page,
            line=text.count("\n", 0, found.start("text")),
            language=found["language"],
            title=found["title"] or "",
            text=found["text"],
            mark=(found["mark"] or "").strip(),
        )
        for found in FENCE.finditer(text)
    ]


def all_blocks() -> Iterator[Block]:
    """Those of all pages."""
    for page in PAGES:
        yield from blocks(page)


def simple_commands(command: str) -> list[list[str]]:
    """The words of each command of a line of shell, without what is between them, and comments."""
    found: list[list[str]] = [[]]
    for word in shlex.split(command, comments=True):
        if word in SHELL_WORDS:
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]


def lockstep_words(words: list[str]) -> list[str] | None:
    """The arguments of `lockstep` in a command; None: it is another one."""
    for place, word in enumerate(words):
        if word == "lockstep" or word.endswith("/lockstep"):
            return words[place + 1 :]
    return None


def check_lockstep(arguments: list[str]) -> None:
    """Parse a command line of `lockstep`, up to what it would do.

    Raises:
        Exception: it is none.
    """
    import typer

    from lockstep.cli.main import app
    from lockstep.cli.task_options import options_of
    from lockstep.recipes import names

    command: Any = typer.main.get_command(app)
    context: Any = command.make_context("lockstep", list(arguments))
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
    job = context.params.get("job")
    if job in names():
        options_of(job).read(context.args)


if __name__ == "__main__":
    for block in all_blocks():
        if block.why_not:
            print(f"{block.place}: {block.why_not}")
