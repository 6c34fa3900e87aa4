"""A file of the user's: its bytes, packed by gzip or not, and its text."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from lockstep.errors import DataError
from lockstep.system.folders import user_path

GZIP = b"\x1f\x8b"
ZIP = b"PK\x03\x04"


def read_content(path: str | Path) -> bytes:
    """The bytes of a file, unpacked if gzip has packed them.

    Raises:
        DataError: it cannot be read.
    """
    try:
        content = user_path(path).read_bytes()
        return gzip.decompress(content) if content.startswith(GZIP) else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read",
            expected="a file that may be read, packed by gzip or not",
            found=f"{type(error).__name__}: {error}; it is {user_path(path).absolute()}",
            fix="look at the path, and at who may read it",
        ) from error


def text_of(content: bytes, source: str | Path) -> str:
    """The text of a file, without the mark that Windows puts before it.

    Args:
        content: the file.
        source: its name, for messages.

    Raises:
        DataError: it is not UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
        wrong = content.find(0)  # in no text, but in UTF-16
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong < 0:
        return text
    if content.startswith(ZIP):
        found, fix = "a ZIP archive, as .xlsx and .npz are", "save it as text"
    else:
        line = content.count(b"\n", 0, wrong) + 1
        found = f"the byte {content[wrong]:#04x} in line {line}"
        encoding = "UTF-16" if 0 in content[:100] else "WINDOWS-1252"
        fix = f"convert it, perhaps so: iconv -f {encoding} -t UTF-8"
    raise DataError(f"{source} is not a text in UTF-8", expected="UTF-8", found=found, fix=fix)
