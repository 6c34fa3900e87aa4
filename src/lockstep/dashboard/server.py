"""Server: the web server of `lockstep watch`, and the process of `run --dashboard`."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lockstep.dashboard.security import ADDRESS, address_file, new_token
from lockstep.errors import JobError, ResourceError
from lockstep.results.run_list import RunList

END_SECONDS = 10.0
"""How long the page's process may take to end."""


def watch(path: str | Path, *, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve a run, or a folder of runs, until a signal ends it. `say` is given the address.

    Raises:
        RunFolderError: there are no runs at `path`.
        ResourceError: the address cannot be had, or the extra `dashboard` is not installed.
    """
    run_list = RunList(path)
    uvicorn = _uvicorn()
    from lockstep.dashboard.app import make_app

    listener = _listen(host, port)
    with contextlib.closing(listener):
        port = listener.getsockname()[1]
        token = new_token()
        names = ["127.0.0.1", "localhost"] if host == "127.0.0.1" else [host]
        origins = frozenset(f"http://{_bracketed(name)}:{port}" for name in names)
        page = f"run/{quote(run_list.path.name)}" if run_list.single else ""
        address = f"http://{_bracketed(host)}:{port}/{page}#token={token}"
        app = make_app(run_list, token, origins, lambda: server.should_exit)
        server = uvicorn.Server(
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, lifespan="off",
                ws="none", timeout_graceful_shutdown=2,
            )
        )  # fmt: skip
        with address_file(run_list.path, address), _ends_by_signal():
            say(address)
            server.run(sockets=[listener])


@contextlib.contextmanager
def _ends_by_signal() -> Iterator[None]:
    """A signal ends the server, and nothing else: uvicorn raises it again at its end."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _uvicorn() -> Any:
    """The module uvicorn, where the extra is installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ResourceError(
            f"the page needs a package that is not installed: {error.name}",
            expected="the extra dashboard",
            fix="pip install 'lockstep-dlp[dashboard]'",
        ) from error
    return uvicorn


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0: any free one."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_unspecified:
            raise JobError(
                f"the page is not served at {host}: under which names it may be asked is not known",
                expected="an address of this machine",
                found=host,
                fix="give one address; or leave it at 127.0.0.1 and use ssh -L PORT:127.0.0.1:PORT",
            )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=64)
    except OSError as error:
        raise ResourceError(
            f"the page cannot be served at {host}:{port}",
            expected="an address of this machine, and a free port",
            found=str(error),
            fix="choose another --port; 0 takes any that is free",
        ) from error


@contextlib.contextmanager
def beside_run() -> Iterator[Callable[[Path], None]]:
    """A process that serves the page of a run, from when the run folder is there to the end.

    Yields what to call with the folder.
    """
    _uvicorn()
    processes: list[tuple[Path, subprocess.Popen[bytes]]] = []

    def start(folder: Path) -> None:
        command = [sys.executable, "-m", "lockstep", "watch", str(folder)]
        process = subprocess.Popen(
            [*command, "--with-parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,  # Ctrl-C stops the run; the page shows how it ends
        )
        processes.append((folder, process))

    try:
        yield start
    finally:
        for folder, process in processes:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            with contextlib.suppress(OSError):  # where it has not ended in good order
                (folder / ADDRESS).unlink(missing_ok=True)
