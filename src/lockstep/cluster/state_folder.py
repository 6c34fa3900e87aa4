"""The state folder: what a host keeps of the cluster that it belongs to.

    STATE/lock          held by the one `up` or `join` that uses the folder
    STATE/node/         who this host is (see `net.identity`)
    STATE/authority/    the cluster's CA, where `up` runs
    STATE/up.json       the ports on which `up` listens, so that they outlast it
    STATE/up.sock       where `up` takes requests of this machine
    STATE/cluster.json  where a host has joined: the name and the address of its `up`
    STATE/guests/ID/    the same for `run --on FILE`, by the fingerprint of the cluster's CA
    STATE/secret        what processes share that torchrun starts on this machine alone
    STATE/code/         code that masters have sent to this host, while its jobs run

Folders have mode 0700 and files 0600; within `code`, the first holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lockstep.errors import IdentityError
from lockstep.net.certificates import fingerprint
from lockstep.net.identity import Identity, private_folder
from lockstep.system.private_files import replace_private

Address = tuple[str, int]
NODE, AUTHORITY, CODE = "node", "authority", "code"
UP, CLUSTER, SECRET = "up.json", "cluster.json", "secret"
MAX_BYTES = 64 << 10


def default_state() -> Path:
    """`lockstep` in $XDG_STATE_HOME, or in ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "lockstep"


def host_name() -> str:
    """This machine's name, in a form that a host may have."""
    return clean_name(socket.gethostname())


def clean_name(name: str) -> str:
    """A machine's name in a form that a host may have, of at most 40 characters."""
    return re.sub(r"[^a-z0-9._-]", "-", name.lower())[:40].strip("._-") or "host"


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    return host in ("localhost", "::1") or host.startswith("127.")


def check_host(host: str) -> str:
    """The address, if others could be told to come there.

    Raises:
        IdentityError: it stands for all addresses of a machine.
    """
    if host in ("", "0.0.0.0", "::", "*"):
        raise IdentityError(
            "other hosts cannot be told to come to every address",
            expected="the address of one interface",
            found=repr(host),
            fix="give --host the address that the other hosts reach this one at",
        )
    return host


def address_towards(address: Address) -> str:
    """The address of this machine on the interface that leads to another's. Sends nothing.

    Raises:
        IdentityError: none leads there.
    """
    try:
        family, _, _, _, target = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect(target)
            return str(sock.getsockname()[0])
    except OSError as error:
        raise IdentityError(
            f"no interface leads to {address[0]}",
            found=str(error),
            fix="give this host's own address with --host",
        ) from None


@dataclass(frozen=True, kw_only=True)
class Home:
    """Where a host finds its cluster."""

    node: str
    """The name of the host on which `up` runs."""
    address: Address

    def to_message(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"node": self.node, "address": list(self.address)}

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> Home:
        """The home in a message.

        Raises:
            IdentityError: it is none.
        """
        try:
            host, port = message["address"]
            return Home(node=str(message["node"]), address=(str(host), int(port)))
        except (KeyError, TypeError, ValueError):
            raise IdentityError(
                "it is not known where the cluster is",
                expected="a name and an address",
                found=ascii(message)[:200],
                fix="join again with a new token and another --state",
            ) from None


@dataclass(frozen=True)
class State:
    """A state folder, made if need be."""

    path: Path

    def __post_init__(self) -> None:
        private_folder(self.path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep the folder to oneself.

        Raises:
            IdentityError: another process has it.
        """
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise IdentityError(
                    f"the state folder {self.path} is in use",
                    expected="one `lockstep up` or `lockstep join` with each",
                    fix="end the other one, or give this one another --state",
                ) from None
            yield
        finally:
            os.close(descriptor)

    @property
    def has_identity(self) -> bool:
        """Whether this host has a name and a certificate."""
        return (self.path / NODE / "node.pem").exists()

    @property
    def may_return(self) -> bool:
        """Whether it has a certificate that is valid now.

        Raises:
            IdentityError: its files are unusable.
        """
        return self.has_identity and not _trouble(self.identity())

    @property
    def cluster_fingerprint(self) -> bytes:
        """Of the CA of the cluster that it has joined."""
        return fingerprint((self.path / NODE / "authority.pem").read_text())

    def identity(self) -> Identity:
        """Who this host is.

        Raises:
            IdentityError: it has not joined a cluster, or its files are unusable.
        """
        return Identity.load(self.path / NODE)

    def guest(self, fingerprint: bytes) -> State:
        """The folder of what this host is in another cluster."""
        private_folder(self.path / "guests")
        return State(self.path / "guests" / fingerprint.hex()[:16])

    @contextlib.contextmanager
    def emptied(self, name: str) -> Iterator[Path]:
        """A folder for what lasts as long as the process that holds the lock; removed at the end.

        What a process has left there that was killed is removed at the beginning.
        """
        folder = self.path / name
        shutil.rmtree(folder, ignore_errors=True)
        private_folder(folder)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def read(self, name: str) -> dict[str, Any]:
        """What a file holds; nothing if there is none.

        Raises:
            IdentityError: it cannot be read.
        """
        try:
            with open(self.path / name, "rb") as file:
                content = json.loads(file.read(MAX_BYTES))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            content = error
        if not isinstance(content, dict):
            raise IdentityError(
                f"{self.path / name} cannot be read",
                expected="what Lockstep wrote there",
                found=str(content)[:200],
                fix="remove it, and join again",
            )
        return content

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a file in one go."""
        replace_private(self.path / name, json.dumps(content).encode())


def check_certificate(identity: Identity) -> None:
    """Check that a host's certificate can be used now.

    Raises:
        IdentityError: it has expired, or is of an older version of Lockstep.
    """
    if trouble := _trouble(identity):
        raise IdentityError(
            "the certificate of this host cannot be used any more",
            expected="one with a role, which was renewed while this host was connected",
            found=trouble,
            fix="where `lockstep up` runs: lockstep token --token-file FILE; here, with the same "
            "--state: lockstep join FILE",
        )


def _trouble(identity: Identity) -> str:
    """Why a certificate cannot be used; "" if it can."""
    found = identity.certificate()
    if found.role is None:
        return "one without a role, of an older version of Lockstep"
    until = datetime.fromtimestamp(found.until, UTC)
    return "" if time.time() < found.until else f"it was valid until {until:%F %T} UTC"
