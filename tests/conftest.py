"""Fixtures that every test has: nothing may be left behind, and run folders that are new.

A test fails if it leaves a process, a descriptor, a thread, a mapping of Lockstep's shared memory,
or a file in /dev/shm. Processes are found by a mark in their environment, which they inherit at
`exec` and keep when their parent dies: an orphan is found as well as a child.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings

import lockstep
from lockstep.system import processes as processes_module
from tests.support import fuzzing

settings.register_profile("lockstep", deadline=None, derandomize=True, database=None)
settings.load_profile("lockstep")

MARK = "LOCKSTEP_TEST_SESSION"
GRACE_SECONDS = 5.0
"""The longest that a process which is on its way out is waited for."""
WITHOUT_RUNS = {"planning", "agent", "coordinator", "net"}
"""Folders whose tests start no run, and need not wait until a forkserver has loaded torch."""
CACHED = ("/dev/null", "/dev/urandom", "/proc/", "/sys/")
"""Files that libraries open at some time and keep open."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=0, help="run the fuzz tests, with so many inputs")


def pytest_configure(config: pytest.Config) -> None:
    fuzzing.asked = config.getoption("--fuzz")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--fuzz`, leave the other tests out."""
    if fuzzing.asked:
        others = [item for item in items if item.get_closest_marker("fuzz") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
        for item in items:
            item.add_marker(pytest.mark.timeout(fuzzing.LIMIT_SECONDS))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if fuzzing.asked:
        terminalreporter.write_line("\n".join(["", *fuzzing.table()]))


def environment_of(pid: int) -> bytes:
    """The environment with which the process was started; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def parent_of(pid: int) -> int:
    """The process's parent; 0 if it is gone."""
    try:
        return processes_module.parent_of(pid)
    except (OSError, IndexError):
        return 0


def describe(pid: int) -> str:
    """A process in words; a zombie has no command line."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        command = "gone"
    return f"process {pid}: {command.strip() or 'ended, but nobody has waited for it'}"


def processes(mark: bytes) -> set[int]:
    """The processes that this session has started, at any remove, and zombies of its own."""
    found = {int(entry) for entry in os.listdir("/proc") if entry.isdigit()} - {os.getpid()}
    return {pid for pid in found if mark in environment_of(pid) or parent_of(pid) == os.getpid()}


def wait_for_end(pid: int, limit: float) -> None:
    """Return when the process has ended, or when the time is up."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.poll(max(0.0, limit - time.monotonic()) * 1000)
    finally:
        os.close(pidfd)


def descriptors() -> dict[int, str]:
    """Every open descriptor of this process, and what it leads to."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except OSError:
            continue  # the one that listed the folder
        if not target.startswith(CACHED):
            found[int(entry)] = target
    return found


def mappings() -> list[str]:
    """The maps of Lockstep's shared memory in this process."""
    return [
        line for line in Path("/proc/self/maps").read_text().splitlines() if "lockstep-" in line
    ]


def shared_files(mark: bytes) -> set[str]:
    """Files in /dev/shm that torch or Lockstep has made, but for those of others' processes."""
    try:
        names = os.listdir("/dev/shm")
    except OSError:
        return set()
    found = set()
    for name in names:
        owner = name.split("_")[1] if name.startswith("torch_") else ""
        foreign = owner.isdigit() and os.path.exists(f"/proc/{owner}")
        foreign = foreign and int(owner) != os.getpid() and mark not in environment_of(int(owner))
        if name.startswith(("torch_", "lockstep")) and not foreign:
            found.add(name)
    return found


@dataclass
class Belongings:
    """What there is at one time."""

    mark: bytes
    processes: set[int] = field(init=False)
    descriptors: dict[int, str] = field(init=False)
    mappings: list[str] = field(init=False)
    threads: set[threading.Thread] = field(init=False)
    shared: set[str] = field(init=False)

    def __post_init__(self) -> None:
        self.processes = processes(self.mark)
        self.descriptors = descriptors()
        self.mappings = mappings()
        self.threads = {thread for thread in threading.enumerate() if not thread.daemon}
        self.shared = shared_files(self.mark)

    def left_since(self, before: Belongings) -> list[str]:
        """What is here and was not there before, in words."""
        left = [describe(pid) for pid in sorted(self.processes - before.processes)]
        left += [
            f"descriptor {fd}: {target}"
            for fd, target in self.descriptors.items()
            if before.descriptors.get(fd) != target
        ]
        left += [f"mapping {line}" for line in self.mappings if line not in before.mappings]
        left += [f"thread {thread.name}" for thread in self.threads - before.threads]
        left += [f"/dev/shm/{name}" for name in sorted(self.shared - before.shared)]
        return left


@pytest.fixture(scope="session")
def session_mark() -> Iterator[bytes]:
    """Marks every process that the tests start."""
    value = uuid.uuid4().hex
    os.environ[MARK] = value
    yield f"{MARK}={value}".encode()
    del os.environ[MARK]


@pytest.fixture(scope="session")
def warm() -> None:
    """Lets torch open what it keeps open, before anything is counted."""
    import torch

    layer = torch.nn.Linear(2, 2)
    layer(torch.zeros(1, 2)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


@pytest.fixture(scope="session")
def preloaded(session_mark: bytes) -> Iterator[None]:
    """Lets runs that tests start in this process begin at once. Commands, agents and masters of
    their own load torch as ever."""
    with lockstep.preloaded():
        yield


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest, session_mark: bytes) -> Iterator[None]:
    """Fails a test that leaves something behind."""
    if "torch" in sys.modules:
        request.getfixturevalue("warm")
    if request.path.parent.name not in WITHOUT_RUNS:
        request.getfixturevalue("preloaded")
    before = Belongings(session_mark)
    yield
    now = Belongings(session_mark)
    if now.left_since(before):
        gc.collect()
        limit = time.monotonic() + GRACE_SECONDS
        for pid in now.processes - before.processes:
            wait_for_end(pid, limit)
        now = Belongings(session_mark)
    left = now.left_since(before)
    for pid in now.processes - before.processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # so that it does not disturb the tests that follow
    if left:
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture
def run_folder(tmp_path: Path) -> str:
    """A path for one run, where nothing is yet."""
    return str(tmp_path / "run")


@pytest.fixture
def run_folders(tmp_path: Path) -> Callable[[], str]:
    """Paths for several runs."""
    numbers = iter(range(1000))
    return lambda: str(tmp_path / f"run-{next(numbers)}")
