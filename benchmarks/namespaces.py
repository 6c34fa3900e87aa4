"""Hosts that are network namespaces of this machine, joined by a bridge. Needs root and iproute2.

Everything is made for one use and named after this process; nothing of it is left.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType

PREFIX = "lockstep"


def missing() -> str:
    """Why there can be no namespaces here; "" if there can."""
    for command in ("ip", "tc"):
        if shutil.which(command) is None:
            return f"there is no {command} here (Debian: iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"{PREFIX}-{os.getpid()}-try"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return tried.stderr.strip()


class Network:
    """So many hosts, at 10.77.0.1 and following. Use it as a context manager."""

    def __init__(self, hosts: int, name: str = "") -> None:
        """`name`: that of a network which another process has made, to run commands on it."""
        self.hosts, self.name = hosts, name or f"{PREFIX}-{os.getpid()}"
        self._bridge = self._name("bridge")

    def _name(self, what: object) -> str:
        return f"{self.name}-{what}"

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove()

    def _make(self) -> None:
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "bridge", "up")
        for host in range(self.hosts):
            name = self._name(host)
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", self._bridge, "link", "add", f"port{host}", "type", "veth",
                "peer", "name", "eth0", "netns", name)  # fmt: skip
            _ip("-n", self._bridge, "link", "set", f"port{host}", "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def _remove(self) -> None:
        for what in (*range(self.hosts), "bridge"):
            subprocess.run(["ip", "netns", "del", self._name(what)], capture_output=True)

    def within(self, host: int, command: Sequence[str]) -> list[str]:
        """A command that runs on a host, which has a core of its own where there are enough."""
        cores = sorted(range(os.cpu_count() or 1))
        each = len(cores) // self.hosts
        own = cores[host * each : (host + 1) * each] or cores
        pinned = ["taskset", "-c", ",".join(map(str, own))]
        return ["ip", "netns", "exec", self._name(host), *pinned, *command]

    def limit(self, rate: str) -> None:
        """Let every host send at so much, such as `100mbit`, at the most."""
        for host in range(self.hosts):
            _run("tc", "-n", self._name(host), "qdisc", "replace", "dev", "eth0", "root", "tbf",
                 "rate", rate, "burst", "128kb", "latency", "50ms")  # fmt: skip

    def cut(self, host: int) -> None:
        """Take a host off the network."""
        _ip("-n", self._bridge, "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Put a host back on the network."""
        _ip("-n", self._bridge, "link", "set", f"port{host}", "up")

    def drop(self, host: int, peer: int) -> None:
        """Let nothing that a host sends reach a peer; what the peer sends does reach it."""
        _ip("-n", self._name(host), "route", "add", "blackhole", f"{self.address(peer)}/32")

    def sent(self, host: int) -> int:
        """Bytes that a host has sent, with all headers."""
        path = "/sys/class/net/eth0/statistics/tx_bytes"
        found = subprocess.run(
            self.within(host, ["cat", path]), capture_output=True, text=True, check=True
        )
        return int(found.stdout)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
