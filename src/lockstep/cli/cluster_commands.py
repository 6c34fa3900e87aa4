"""Cluster commands: up, token, hosts, join, pack, secret."""

from __future__ import annotations

import json
import sys
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lockstep.cluster.token_file import read_token, write_tokens
from lockstep.errors import JobError

if TYPE_CHECKING:
    from lockstep.cluster.daemon.head import Head

StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state", help="The state folder.  [~/.local/state/lockstep]", show_default=False
    ),
]
Valid = Annotated[float, typer.Option(min=0.0, help="Seconds until a token expires.")]


def add_to(app: typer.Typer) -> None:
    """Add these commands to `lockstep`."""
    for command in (up, token, hosts, join, pack, secret):
        app.command()(command)


def up(
    state: StateOption = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(min=0, max=65534, help="The port for hosts; new hosts enrol on the next one."),
    ] = 0,
    name: Annotated[
        str | None, typer.Option(help="This host's name; kept after the first start.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=0, max=1000, help="Number of join tokens to print.")
    ] = 1,
    token_file: Annotated[
        Path | None, typer.Option(help="Write the tokens to FILE, or FILE-1, FILE-2, ... instead.")
    ] = None,
    valid: Valid = 900.0,
) -> None:
    """Make this machine the head of a cluster. Prints join tokens, and runs until it is stopped."""
    from lockstep.cluster.daemon.head import run_up

    def ready(here: Head) -> None:
        report(here.identity.node, f"`lockstep up` at {here.address[0]}:{here.address[1]}")
        made = [here.token(valid) for _ in range(tokens)]
        if token_file is None:
            print(*made, sep="\n", flush=True)
        else:
            write_tokens(token_file, made)
        _invite(here, token_file)

    run_up(
        _state(state),
        name=name,
        host=host,
        port=port,
        report=report,
        ready=ready,
    )


def _invite(here: Head, file: Path | None) -> None:
    """Say what to type on the hosts that are to join. A token is a secret: it is on stdout
    alone, and goes to `join` by its stdin or a file, never on its command line."""
    address = here.address[0]
    if ip_address(address).is_loopback:
        where = "on this machine (for others, start with --host ADDRESS), in a folder of its own"
        options = " --state FOLDER"
    else:
        where, options = "on another machine", ""
    if file is not None:
        report(here.identity.node, f"{where}: lockstep join {file.name}{options}")
        return
    report(here.identity.node, f"{where}: lockstep join -{options}, and paste a token, one a host")


def token(
    state: StateOption = None,
    valid: Valid = 900.0,
    token_file: Annotated[
        Path | None, typer.Option(help="Write the token to FILE, which nobody else can read.")
    ] = None,
) -> None:
    """Print another join token of the `lockstep up` on this machine. Keep it like a password."""
    from lockstep.cluster.daemon.cluster_messages import AskToken, TokenAnswer
    from lockstep.cluster.daemon.control_socket import ask

    made = ask(_state(state), AskToken(seconds=valid), TokenAnswer).token
    if token_file is None:
        print(made)
    else:
        write_tokens(token_file, [made])


def hosts(
    state: StateOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    remove: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Instead: end this host's connections, and refuse its certificate."
        ),
    ] = None,
) -> None:
    """List the hosts that have joined the `lockstep up` on this machine, and their jobs."""
    if remove is not None:
        _remove(_state(state), remove, as_json=as_json)
        return
    from lockstep.cluster.daemon.cluster_messages import AskHosts, HostsAnswer
    from lockstep.cluster.daemon.control_socket import ask
    from lockstep.system.messages import printable

    rows = ask(_state(state), AskHosts(), HostsAnswer).hosts
    if as_json:
        members = [{"name": row.name, "workers": row.workers, "jobs": row.jobs} for row in rows]
        print(json.dumps(members))
        return
    if not rows:
        print(
            "no host has joined; to invite one: lockstep token --token-file FILE, "
            "then there: lockstep join FILE"
        )
    for row in rows:
        jobs = ", ".join(f"{job} {status}" for job, status in row.jobs.items())
        print(printable(f"{row.name:<24} {row.workers:>3} workers  {jobs}".rstrip()))


def _remove(state: Path, name: str, *, as_json: bool) -> None:
    from lockstep.cluster.daemon.cluster_messages import HostRemoved, RemoveHost
    from lockstep.cluster.daemon.control_socket import ask
    from lockstep.system.messages import printable

    done = ask(state, RemoveHost(name=name), HostRemoved)
    if as_json:
        told = {"connected": done.connected, "jobs": done.jobs, "offers": done.offers}
        print(json.dumps({"removed": done.name, **told}))
        return
    line = "its connections are ended" if done.connected else "it was not connected"
    print(f"{done.name} is removed: {line}, and its certificate is refused from now on")
    if done.jobs:
        print(printable(f"jobs that go on without it: {', '.join(done.jobs)}"))
    if done.offers:
        print(printable(f"jobs of it, which other hosts leave: {', '.join(done.offers)}"))
    print(
        f"the name {done.name} is free; to let that host join again: lockstep token --token-file "
        "FILE, then there: lockstep join FILE --state FOLDER, with a new folder"
    )


def join(
    token: Annotated[
        str | None, typer.Argument(help="A file with a join token, or - for stdin.")
    ] = None,
    state: StateOption = None,
    name: Annotated[str | None, typer.Option(help="This host's name in the cluster.")] = None,
    host: Annotated[
        str | None, typer.Option(help="The address of this host for the others.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", min=1, help="Worker processes for each job.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="A module whose Tasks may run here, besides recipes, or the full name of a Task "
            "or a function, MODULE:NAME. May be repeated."
        ),
    ] = None,
    allow_code: Annotated[
        list[str] | None,
        typer.Option(help="The digest of code that may be sent and run here. May be repeated."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder whose files recipes may read, given by their path. May be repeated."
        ),
    ] = None,
) -> None:
    """Make this machine a host of a cluster. The first time takes a token. Runs until stopped."""
    from lockstep.cluster.daemon.admission import Allowed
    from lockstep.cluster.daemon.node import run_member
    from lockstep.cluster.state_folder import host_name
    from lockstep.system import machine

    run_member(
        _state(state),
        read_token(token) if token else None,
        name=name or host_name(),
        host=host,
        workers=workers or machine.cores(),
        allowed=Allowed(
            modules=tuple(allow or ()),
            code=tuple(map(_digest, allow_code or ())),
            data=tuple(data or ()),
        ),
        report=report,
    )


def pack(
    task: Annotated[str, typer.Argument(help="module:Task, file.py:Task, or a module alone.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the files that `run --ship-code` would send, with the digest for `--allow-code`."""
    from lockstep.job.code_archive import pack as pack_code

    archive = pack_code(task)
    if as_json:
        print(json.dumps({"digest": archive.digest, "files": dict(archive.files)}))
        return
    print(archive.digest)
    for name, nbytes in archive.files.items():
        print(f"{nbytes:>9,}  {name}")


def secret(path: Annotated[Path, typer.Argument(help="The file to write.")]) -> None:
    """Write a secret file for jobs that torchrun or SLURM starts on several hosts."""
    from lockstep.net.shared_secret import make_secret

    make_secret(path)
    print(path)


def _digest(text: str) -> str:
    from lockstep.net.blob_transfer import is_digest

    if not is_digest(text):
        raise JobError(
            "--allow-code does not have a digest",
            expected="64 hexadecimal digits, as `lockstep pack` prints them",
            found=ascii(text),
        )
    return text


def report(who: str, why: str) -> None:
    """Report an event on stderr."""
    from lockstep.system.messages import printable

    print(printable(f"lockstep: {who}: {why}"), file=sys.stderr, flush=True)


def _state(path: Path | None) -> Path:
    from lockstep.cluster.state_folder import default_state

    return path or default_state()
