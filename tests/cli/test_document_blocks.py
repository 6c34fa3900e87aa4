"""Every block of code in the documents is run, or says why not; every command in one is real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lockstep.recipes.datasets import fetch
from tests.support.document_blocks import PAGES as ALL_PAGES
from tests.support.document_blocks import (
    RUN,
    SHOWN,
    Block,
    all_blocks,
    blocks,
    check_lockstep,
    lockstep_words,
    simple_commands,
)
from tests.support.file_tree import ROOT
from tests.support.page_runs import PageRun

BLOCKS = list(all_blocks())
PAGES = [page for page in ALL_PAGES if any(block.is_run for block in blocks(page))]
COMMAND = re.compile(r"^(\$|lockstep|python|pip|make|ray|srun|torchrun|docker|kubectl)\b", re.M)


def name_of(block: Block) -> str:
    return block.place


@pytest.mark.parametrize("block", BLOCKS, ids=name_of)
def test_a_block_is_run_or_says_why_not(block: Block) -> None:
    assert block.language in (*RUN, *SHOWN, *("bash",) * bool(block.why_not)), (
        "name its language: python, console, yaml, text; or say why not: <!-- not run: ... -->"
    )
    if block.language in SHOWN:
        assert not COMMAND.search(block.text), "commands are in a block of the language console"
    if block.language == "console":
        assert block.commands(), "what is printed alone is a block of the language text"
    if block.mark:
        known = block.why_not or block.setup or block.background or block.mark.startswith("file ")
        assert known, f"unknown comment: {block.mark}"


def test_what_is_not_run_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """And is the smaller part."""
    left = [block for block in BLOCKS if block.why_not]
    with capsys.disabled():
        print()
        for block in left:
            print(f"  not run: {block.place}: {block.why_not}")
    assert all(len(block.why_not) > 10 for block in left)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language in ("console", "bash")], ids=name_of
)
def test_the_commands_are_real(block: Block) -> None:
    """Parsed as `lockstep` parses them, also where they are not run."""
    lines = block.commands() if block.language == "console" else block.text.splitlines()
    for line in lines:
        for words in simple_commands(line):
            arguments = lockstep_words(words)
            if arguments is not None:
                check_lockstep(arguments)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page(page: Path, tmp_path: Path) -> None:
    """Run in the order in which they stand, in an empty folder."""
    fetch("mnist")
    folder = tmp_path / "page"
    folder.mkdir()
    printed = PageRun(page, folder).run()
    if page.name == "tutorial.md":
        assert len(set(re.findall(r"^fingerprint  (\w+)$", printed, re.M))) == 1
