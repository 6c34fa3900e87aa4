"""A SLURM cluster on this machine: its controller and nodes, in a folder of its own, on loopback.

No node has a daemon of the system's: all are started here, without cgroups and without munge, and
are gone when it is closed.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import MARK, describe, environment_of, processes, wait_for_end
from tests.support.harmed_runs import until

ROOT = Path(__file__).parents[2]
LIMIT = 120.0
COMMANDS = ("slurmctld", "slurmd", "srun", "sinfo", "squeue")
CONFIGURATION = """
ClusterName=lockstep
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
{nodes}
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 State=UNKNOWN"


def missing() -> str:
    """Why there can be no SLURM here; "" if there can."""
    for command in COMMANDS:
        if shutil.which(command) is None:
            return f"there is no {command} here (Debian: slurm-wlm)"
    if os.geteuid() != 0:
        return "its daemons are started by root"
    return ""


class SlurmNodes:
    """SLURM's daemons, and what they have started: node1, node2 and so on."""

    def __init__(self, nodes: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets: a short path
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        with contextlib.ExitStack() as stack:
            free = [stack.enter_context(socket.create_server(("", 0))) for _ in range(nodes + 1)]
            ports = [each.getsockname()[1] for each in free]
        host = socket.gethostname().partition(".")[0]
        lines = [
            NODE.format(name=name, host=host, port=port)
            for name, port in zip(self.names, ports[1:], strict=True)
        ]
        configuration = self.folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(
                host=host,
                ports=ports,
                user=pwd.getpwuid(os.geteuid()).pw_name,
                folder=self.folder,
                nodes="\n".join(lines),
            )
        )
        (self.folder / "state").mkdir()
        (self.folder / "t").mkdir()
        self.mark = f"SLURM_CONF={configuration}".encode()  # the one that slurmstepd keeps
        self.environment = {
            MARK: secrets.token_hex(16),
            "SLURM_CONF": str(configuration),
            "TMPDIR": str(self.folder / "t"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start("slurmctld", "-D")
            for name in self.names:
                (self.folder / f"spool-{name}").mkdir()
                self._start("slurmd", "-D", "-N", name)
            until(self._ready, LIMIT, "that all nodes are idle")
        except BaseException as error:
            log = (self.folder / "log").read_text()
            self.close()
            raise AssertionError(f"SLURM has not started:\n{log[-4000:]}") from error

    def _start(self, *command: str) -> None:
        with (self.folder / "log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    command, env={**os.environ, **self.environment}, stdout=log, stderr=log
                )
            )

    def _ask(self, *command: str) -> list[str]:
        return subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True
        ).stdout.split()

    def _ready(self) -> bool:
        assert all(daemon.poll() is None for daemon in self._daemons)
        return self._ask("sinfo", "-h", "-N", "-o", "%T") == ["idle"] * len(self.names)

    def srun(
        self, arguments: Sequence[str], cwd: Path, environment: dict[str, str]
    ) -> subprocess.Popen[str]:
        """Start `srun`, with what it says in pipes."""
        return subprocess.Popen(
            ["srun", *arguments],
            cwd=cwd,
            env={**os.environ, **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ranks(self) -> dict[int, int]:
        """By rank, the process that SLURM has started for it."""
        found = {}
        for pid in self._all():
            words = dict(word.partition(b"=")[::2] for word in environment_of(pid).split(b"\0"))
            if words.get(b"SLURM_TASK_PID") == str(pid).encode():
                found[int(words[b"SLURM_PROCID"])] = pid
        return found

    def ours(self) -> list[str]:
        """The processes there that are of Lockstep, in words."""
        return [
            describe(pid)
            for pid in self._all()
            if "lockstep" in describe(pid) and b"SLURM_PROCID=" in environment_of(pid)
        ]

    def _all(self) -> list[int]:
        return [pid for pid in sorted(processes(self.mark)) if self.mark in environment_of(pid)]

    def files(self) -> list[Path]:
        """What Lockstep has in the folder for temporary files."""
        return sorted((self.folder / "t").glob("lockstep*"))

    def await_rest(self) -> None:
        """Wait until SLURM has no job, and no process of Lockstep is left."""
        rests = lambda: not self.ours() and not self._ask("squeue", "-h")  # noqa: E731
        try:
            until(rests, LIMIT, "that nothing of the job is left")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.ours()}") from None

    def close(self) -> None:
        """End all of it."""
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10.0)  # one that still waits for a step is killed
            daemon.kill()
            daemon.wait()
        for pid in self._all():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_for_end(pid, 5.0)
        shutil.rmtree(self.folder)
