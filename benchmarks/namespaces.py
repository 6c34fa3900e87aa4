"""Hosts that are network namespaces of this machine, joined by a bridge. Needs root and iproute2.

Everything is made for one use and named after this process; nothing of it is left.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType

from benchmarks.process import ROOT, environment

PREFIX = "lockstep"
_ANSWER = 60.0
"""Seconds in which wires answer, on a machine that does other things as well."""


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

    def __init__(
        self,
        hosts: int,
        name: str = "",
        delay: float | None = None,
        control: int | None = None,
    ) -> None:
        """`name`: that of a network which another process has made, to run commands on it.
        `delay`: packets take so many seconds from each host to the bridge, and back; of such
        networks (0.0 will do) it can be changed. See `benchmarks.delays.missing`. `control`: the
        descriptor by which another process's network is told of delays; it is not waited for."""
        self.hosts, self.name = hosts, name or f"{PREFIX}-{os.getpid()}"
        self._delay, self._control = delay, control
        self._wires: subprocess.Popen[bytes] | None = None
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
        if self._delay is not None:
            self._start_wires()
        for host in range(self.hosts):
            name = self._name(host)
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
            if self._delay is None:
                _ip("-n", self._bridge, "link", "add", f"port{host}", "type", "veth",
                    "peer", "name", "eth0", "netns", name)  # fmt: skip
            else:
                _ip("-n", self._bridge, "link", "set", f"near{host}", "name", "eth0",
                    "netns", name)  # fmt: skip
                _ip("-n", self._bridge, "link", "set", f"far{host}", "name", f"port{host}")
                self.delay(host, self._delay, self._delay)
            _ip("-n", self._bridge, "link", "set", f"port{host}", "master", "bridge", "up")
            _ip("-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")

    def _start_wires(self) -> None:
        command = [sys.executable, "-m", "benchmarks.delays", str(self.hosts)]
        self._wires = subprocess.Popen(
            ["ip", "netns", "exec", self._bridge, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment(),
        )
        self._await_wires()

    def _await_wires(self) -> None:
        assert self._wires is not None
        assert self._wires.stdout is not None
        answer = self._wires.stdout.fileno()
        ready, _, _ = select.select([answer], [], [], _ANSWER)
        if not ready or not os.read(answer, 64):
            raise RuntimeError(f"the wires of the network have not answered in {_ANSWER:.0f} s")

    def _remove(self) -> None:
        if self._wires is not None:
            self._wires.kill()  # its devices go with it
            self._wires.communicate()
            self._wires = None
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

    def delay(self, host: int, sending: float, receiving: float) -> None:
        """Let what a host sends take so many seconds from now on, and what it receives."""
        control = self.control
        assert control is not None, "the network was not made with a delay"
        os.write(control, f"{host} {sending} {receiving}\n".encode())
        if self._wires is not None:
            self._await_wires()

    @property
    def control(self) -> int | None:
        """The descriptor that takes changes of delays; None: there are none."""
        if self._wires is None:
            return self._control
        assert self._wires.stdin is not None
        return self._wires.stdin.fileno()

    def cut(self, host: int) -> None:
        """Take a host off the network."""
        _ip("-n", self._bridge, "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Put a host back on the network."""
        _ip("-n", self._bridge, "link", "set", f"port{host}", "up")

    def drop(self, host: int, peer: int) -> None:
        """Let nothing that a host sends reach a peer; what the peer sends does reach it."""
        _ip("-n", self._name(host), "route", "add", "blackhole", f"{self.address(peer)}/32")

    def let_through(self, host: int, peer: int) -> None:
        """Undo `drop`."""
        _ip("-n", self._name(host), "route", "del", "blackhole", f"{self.address(peer)}/32")

    def kill(self, host: int) -> None:
        """Kill everything that runs on a host."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._name(host)], capture_output=True, text=True, check=True
        )
        for pid in map(int, found.stdout.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

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
