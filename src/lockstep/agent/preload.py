"""Preload: a forkserver with torch loaded, kept for many runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lockstep.agent.forkserver_client import LOAD_SECONDS, ForkServerClient
from lockstep.errors import WorkerLostError
from lockstep.planning.forkserver_messages import Preload, Preloaded
from lockstep.system import numerics
from lockstep.system.shared_memory import set_allocator

READ_ONCE = (
    "ATEN_", "CUDA_", "DNNL_", "GLIBC_", "GOMP_", "KMP_", "LD_", "MALLOC_", "MKL_", "OMP_",
    "ONEDNN_", "PYTHON", "TORCH",
)  # fmt: skip
"""How the names of variables begin that Python, torch and its libraries read when they start."""


@dataclass(frozen=True, kw_only=True)
class _Preloaded:
    """A forkserver with torch and without a task."""

    forkserver: ForkServerClient
    fixed: Mapping[str, str]
    owner: int

    def suits(self, environment: Mapping[str, str]) -> bool:
        """Whether a clone of it is what a new process with this environment would be."""
        return os.getpid() == self.owner and _fixed(environment) == self.fixed


_preloaded: _Preloaded | None = None
"""The forkserver that is kept, while `preloaded` is open."""


@contextlib.contextmanager
def preloaded() -> Iterator[None]:
    """While this is open, runs of this process begin in a fraction of a second.

    A process that has torch loaded is kept, and their forkservers are its forks: for searches over
    settings, notebooks, tests. They have the limits and the control group that this process had
    when it was opened. A run whose environment asks for other numerics, or sets another variable
    that is read at the start alone, loads torch for itself. Leave it after the last run has ended:
    it takes what still goes on with it.

    Raises:
        WorkerLostError: torch cannot be loaded.
    """
    global _preloaded
    environment = environment_for("native")
    forkserver, before = ForkServerClient.start(environment), _preloaded
    try:
        forkserver.ask(Preload(), Preloaded, LOAD_SECONDS)
        _preloaded = _Preloaded(forkserver=forkserver, fixed=_fixed(environment), owner=os.getpid())
        yield
    finally:
        _preloaded = before
        forkserver.close()


def environment_for(profile: str) -> dict[str, str]:
    """This process's environment, with what a forkserver of this numerics profile needs."""
    environment = dict(os.environ)
    numerics.set_environment(profile, environment)
    set_allocator(environment)
    return environment


def new_forkserver(environment: Mapping[str, str]) -> ForkServerClient:
    """A forkserver without a task: a clone of the preloaded one if that comes to the same."""
    if _preloaded is not None and _preloaded.suits(environment):
        with contextlib.suppress(WorkerLostError):  # somebody has killed it
            return _preloaded.forkserver.clone(environment)
    return ForkServerClient.start(environment)


def _fixed(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_ONCE)}
