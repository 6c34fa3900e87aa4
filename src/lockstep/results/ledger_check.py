"""Ledger check: follows the ledger's chain of hashes while it grows, a part at a time."""

from __future__ import annotations

from pathlib import Path

from lockstep.results.ledger import FIRST, chain
from lockstep.system.json_files import open_regular

PART_BYTES = 1 << 20


class LedgerCheck:
    """How far the lines of a ledger are those that were chained."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._restart()

    def _restart(self) -> None:
        self._at, self._hash = 0, FIRST
        self.steps = 0
        """So many steps' lines have the right hash, one after another."""
        self.broken: int | None = None
        """The number of the first line that has not, from 1."""
        self._lines = 0
        self.whole = False
        """Whether the ledger has its last line."""

    def advance(self) -> bool:
        """Check the next part; whether there was one."""
        try:
            with open_regular(self._path) as file:
                if file.seek(0, 2) < self._at:  # a resume has cut it
                    self._restart()
                file.seek(self._at)
                part = file.read(PART_BYTES)
        except OSError:
            return False
        part = part[: part.rfind(b"\n") + 1]
        if not part or self.broken is not None:
            return False
        for line in part.splitlines(keepends=True):
            self._check(line)
            if self.broken is not None:
                break
        self._at += len(part)
        return True

    def _check(self, line: bytes) -> None:
        self._lines += 1
        body, separator, tail = line.rpartition(b',"hash":"')
        expected = chain(self._hash, body.decode(errors="replace"))
        if not separator or tail != f'{expected}"}}\n'.encode():
            self.broken = self._lines
            return
        self._hash = expected
        self.steps += line.startswith(b'{"step":')
        self.whole = line.startswith(b'{"end":')
