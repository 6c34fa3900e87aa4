"""Page runs: a page's blocks, run in the order in which they stand, in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from lockstep.job.job_file import read_job_file
from tests.support.document_blocks import Block, blocks
from tests.support.file_tree import ROOT

LIMIT_SECONDS, READY_SECONDS = 600.0, 120.0
MARK = "LOCKSTEP_PAGE_RUN"
"""An environment variable that every process of a page has."""
LOCKSTEP = f"""#!{sys.executable}
from lockstep.cli.main import main
main()
"""
PKILL = f"""#!{sys.executable}
# pkill, of a test: it waits until there is such a process, and reaches those of its page alone.
import os, re, sys, time
pattern, limit = sys.argv[-1], time.monotonic() + 120
mine = f"{MARK}={{os.environ['{MARK}']}}".encode()
found = []
while not found and time.monotonic() < limit:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            title = open(f"/proc/{{pid}}/cmdline", "rb").read().replace(b"\\0", b" ").decode()
            environment = open(f"/proc/{{pid}}/environ", "rb").read().split(b"\\0")
        except OSError:
            continue
        if mine in environment and re.search(pattern, title) and int(pid) != os.getpid():
            found.append(int(pid))
    time.sleep(0.2)
time.sleep(1)  # somewhere in its steps
for pid in found:
    os.kill(pid, int(sys.argv[1][1:]))
sys.exit(not found)
"""


class PageRun:
    """Runs the blocks of a page."""

    def __init__(self, page: Path, folder: Path) -> None:
        self.page, self.folder = page, folder
        self.printed = ""
        tools = folder.parent / "bin"
        tools.mkdir()
        for name, text in (("pkill", PKILL), ("lockstep", LOCKSTEP)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        path = f"{tools}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        self.environment = {**os.environ, "PATH": path, MARK: uuid.uuid4().hex}
        self._others: list[subprocess.Popen[str]] = []

    def run(self) -> str:
        """Run them all; what the commands printed.

        Raises:
            AssertionError: one has failed.
        """
        with self._ended():
            for block in blocks(self.page):
                if block.is_run:
                    self._run(block)
        return self.printed

    def _run(self, block: Block) -> None:
        match block.language:
            case "python" if block.title:
                self._write(block)
            case "python":
                file = self.folder / f"block_{block.line}.py"
                file.write_text(f"{block.setup}\n{block.text}")
                self._shell(f"python {file.name}", block)
            case "yaml":
                if block.title:
                    self._write(block)
                file = self.folder / f"block_{block.line}.yaml"
                file.write_text(block.text)
                read_job_file(file)
            case "console":
                if block.setup:
                    exec(block.setup, {"folder": self.folder})
                for command in block.commands():
                    for each in made(command):
                        self._shell(each, block)
                if block.until:
                    self._wait(block)

    def _write(self, block: Block) -> None:
        (self.folder / block.title).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / block.title).write_text(block.text)

    def _shell(self, command: str, block: Block) -> None:
        process = subprocess.Popen(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, text=True,
            stdout=subprocess.DEVNULL if block.background else subprocess.PIPE,
            stderr=subprocess.DEVNULL if block.background else subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        if block.background:
            self._others.append(process)
            return
        begun = time.monotonic()
        printed, errors = process.communicate(timeout=LIMIT_SECONDS)
        where = f"{block.place}: {command}"
        print(f"{time.monotonic() - begun:6.1f} s  {where}")
        assert process.returncode == 0, f"{where}\n{printed}\n{errors}"
        self.printed += printed

    def _wait(self, block: Block) -> None:
        """Wait until what goes on in the background is ready."""
        limit = time.monotonic() + READY_SECONDS
        command = ["bash", "-c", block.until]
        while subprocess.run(command, cwd=self.folder, env=self.environment).returncode:
            assert time.monotonic() < limit, f"{block.place}: {block.until}"
            time.sleep(0.2)

    @contextlib.contextmanager
    def _ended(self) -> Iterator[None]:
        try:
            yield
        finally:
            for other in self._others:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(other.pid, signal.SIGTERM)
            for other in self._others:
                other.wait(READY_SECONDS)


def made(command: str) -> list[str]:
    """The commands that a command stands for: those of a target of the Makefile, without what it
    installs; nothing for the activation of an environment."""
    words = command.split()
    if words[:1] == ["source"]:
        return []
    if words[:1] != ["make"]:
        return [command]
    text = (ROOT / "Makefile").read_text()
    recipe = text.partition(f"\n{words[1]}: ")[2].partition("\n\n")[0].splitlines()[1:]
    return [line.strip().replace("$(BIN)/", "").replace("$(ARGS)", "") for line in recipe]
