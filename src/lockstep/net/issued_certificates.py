"""Issued certificates: the CA's book of which name has which key, and which certificates.

    STATE/authority/issued/NAME    the key's fingerprint; serial numbers, until when each is valid

A name is given to one key. Its certificates may be renewed, until the name is taken back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lockstep.errors import IdentityError, RefusedError
from lockstep.net.certificates import SKEW_SECONDS
from lockstep.net.identity import private_folder
from lockstep.system.private_files import replace_private, write_private


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of a name."""

    key: str = ""
    """SHA-256 of the public key, in hexadecimal digits; "" in the books of older versions, whose
    certificates have no role and are refused."""
    serials: Mapping[str, float] = field(default_factory=dict)
    """The certificates that have not expired."""


class IssuedCertificates:
    """The book, in a folder. For one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def names(self) -> list[str]:
        """Every name that is given."""
        return sorted(path.name for path in private_folder(self._folder).iterdir()
                      if not path.name.startswith("."))  # fmt: skip

    def entry(self, name: str) -> Entry | None:
        """What is known of a name; None: it is free.

        Raises:
            IdentityError: the book cannot be read.
        """
        path = self._folder / name
        try:
            content = path.read_bytes()
            if not content:
                return Entry()
            found = json.loads(content)
            serials = {str(serial): float(until) for serial, until in found["serials"].items()}
            return Entry(key=str(found["key"]), serials=serials)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise IdentityError(
                f"{path} cannot be read",
                expected="what Lockstep wrote there",
                found=ascii(str(error))[:200],
                fix=f"if it is damaged, empty it; then let {name} join again with a new token",
            ) from error

    def check(self, name: str, key: str) -> None:
        """Raise `RefusedError` if a name is another key's."""
        entry = self.entry(name)
        if entry is not None and entry.key not in ("", key):
            raise RefusedError(
                f"the name {name} has a certificate already",
                expected="a name that no host of the cluster has",
                found=name,
                fix="join under another name; or, if that host is no more, free it where "
                f"`lockstep up` runs: lockstep hosts --remove {name}",
            )

    def record(self, name: str, key: str, serial: str, until: float, now: float) -> None:
        """Note a certificate, before anybody gets it. A name that is free goes to one alone."""
        entry = self.entry(name)
        known = {} if entry is None else entry.serials
        serials = {s: at for s, at in known.items() if at + SKEW_SECONDS > now}
        content = json.dumps({"key": key, "serials": {**serials, serial: until}}).encode()
        path = private_folder(self._folder) / name
        if entry is not None:
            replace_private(path, content)
            return
        try:
            write_private(path, content)
        except FileExistsError:  # somebody was faster
            self.check(name, key)
            self.record(name, key, serial, until, now)

    def forget(self, name: str) -> None:
        """Free a name. Its certificates are to be refused before."""
        (self._folder / name).unlink(missing_ok=True)
