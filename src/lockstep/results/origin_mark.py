"""Origin mark: by it a user's own runs are told from run folders that come from elsewhere.

The manifest of a run names a task, which `resume`, `verify`, `evaluate` and `predict` import and
call. The mark is an HMAC of that name and its arguments under a secret of the user, which is in no
run folder: nobody else can name code that this user then runs.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECRET = "run-secret"
SECRET_BYTES = 32


def mark_of(source: Mapping[str, Any]) -> str:
    """The mark of a run that is made now; empty where the secret cannot be kept."""
    secret = _secret(make=True)
    return "" if secret is None else _mark(secret, source)


def is_own(mark: object, source: Mapping[str, Any]) -> bool:
    """Whether this user has made a run whose manifest has this mark, and names this task."""
    secret = _secret(make=False)
    if secret is None or not isinstance(mark, str) or not mark.isascii():
        return False
    return hmac.compare_digest(mark, _mark(secret, source))


def secret_path() -> Path:
    """Where the user's secret is: `$XDG_CONFIG_HOME/lockstep/run-secret`."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # The XDG specification says to ignore a relative path.
    folder = Path(base) if os.path.isabs(base) else Path("~/.config").expanduser()
    return folder / "lockstep" / SECRET


def _mark(secret: bytes, source: Mapping[str, Any]) -> str:
    text = json.dumps(source, sort_keys=True).encode()
    return hmac.new(secret, b"lockstep run\0" + text, "sha256").hexdigest()


def _secret(*, make: bool) -> bytes | None:
    """The secret, made where there is none yet; None: there is none that nobody else can read."""
    try:
        path = secret_path()
        if make and not path.exists():
            _make(path)
        with path.open("rb") as file:
            mode = os.fstat(file.fileno())
            found = file.read(SECRET_BYTES + 1)
    except (OSError, RuntimeError):  # the latter: there is no home
        return None
    private = mode.st_uid == os.geteuid() and not stat.S_IMODE(mode.st_mode) & 0o077
    return found if private and len(found) == SECRET_BYTES else None


def _make(path: Path) -> None:
    """Write a new secret, whole or not at all; another process may have done so meanwhile."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink()
