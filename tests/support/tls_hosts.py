"""Hosts for the tests of the network: a cluster's certificates, and transports of each kind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from lockstep.net.certificate_authority import Authority, make_request, store
from lockstep.net.certificates import Role
from lockstep.net.identity import Identity
from lockstep.net.simulated_transport import Network
from lockstep.net.tcp_transport import TcpTransport
from lockstep.net.transport import Report, Transport, ignore
from lockstep.system.messages import Codec, Message

LIMIT = 20.0
"""Seconds: for waits that end by themselves."""
FACTS = {"torch": "2.13.0", "probe": "0f" * 16}


class Said(Message):
    """What hosts say to each other in tests."""

    number: int = 0
    text: str = ""


SAID: Codec[Message] = Codec(Said)
Open = Callable[..., list[Transport]]
"""Opens connected hosts of these names; `facts` has the facts of some that are different."""


class Cluster:
    """A CA in a folder, and hosts that it has given certificates to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority.open(folder / "authority")

    def identity(
        self,
        name: str,
        *,
        role: Role = Role.HOST,
        seconds: float = 3600.0,
        now: float | None = None,
    ) -> Identity:
        """The identity of this name; made at the first call."""
        folder = self.folder / name
        if not folder.exists():
            request = make_request(folder, name)
            signed = self.authority.sign(request, role=role, seconds=seconds, now=now)
            store(folder, signed, self.authority.certificate)
        return Identity.load(folder)

    def transport(
        self, name: str, *, facts: dict[str, str] | None = None, report: Report = ignore
    ) -> TcpTransport:
        return TcpTransport(
            self.identity(name), job="job", facts=facts or FACTS, codec=SAID, report=report
        )


def connect(transports: Sequence[TcpTransport], timeout: float = LIMIT) -> None:
    """Connect all with all. Raises the error of the first that fails."""
    addresses = {each.node: each.address for each in transports}
    with ThreadPoolExecutor(len(transports)) as pool:
        done = [
            pool.submit(
                each.connect, {k: v for k, v in addresses.items() if k != each.node}, timeout
            )
            for each in transports
        ]
    for each in done:
        each.result()


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of transport, and which promises it does not make."""

    name: str
    tells_losses: bool = True
    """Whether one loss is heard of, and leaves the others alone."""
    checks_sizes: bool = True


KINDS = (
    Kind(name="tcp"),
    Kind(name="gloo", tells_losses=False, checks_sizes=False),
    Kind(name="memory"),
)


@contextlib.contextmanager
def opener(kind: Kind, cluster: Cluster) -> Iterator[Open]:
    """Opens hosts of a kind, and closes them."""
    opened: list[Transport] = []
    stores: list[object] = []

    def facts_of(name: str, facts: dict[str, dict[str, str]] | None) -> dict[str, str]:
        return (facts or {}).get(name, FACTS)

    def tcp(*names: str, facts: dict[str, dict[str, str]] | None = None) -> list[Transport]:
        made = [cluster.transport(name, facts=facts_of(name, facts)) for name in names]
        opened.extend(made)
        connect(made)
        return list(made)

    def memory(*names: str, facts: dict[str, dict[str, str]] | None = None) -> list[Transport]:
        network = Network()
        opened.extend(network.join(name, facts=facts_of(name, facts), codec=SAID) for name in names)
        return list(opened)

    def gloo(*names: str, facts: dict[str, dict[str, str]] | None = None) -> list[Transport]:
        from torch._C._distributed_c10d import TCPStore

        from lockstep.net.gloo_transport import GlooTransport

        limit = timedelta(seconds=LIMIT)
        server = TCPStore(  # libuv would keep descriptors open to the end
            "127.0.0.1", 0, None, True, limit, wait_for_workers=False, use_libuv=False
        )
        stores.append(server)

        def one(name: str) -> GlooTransport:
            client = TCPStore("127.0.0.1", server.port, None, False, limit)
            return GlooTransport(
                names,
                client,
                node=name,
                job="job",
                facts=facts_of(name, facts),
                timeout=LIMIT,
                codec=SAID,
            )

        with ThreadPoolExecutor(len(names)) as pool:
            done = [pool.submit(one, name) for name in names]
        made: list[Transport] = [each.result() for each in done]
        opened.extend(made)
        return made

    try:
        yield {"tcp": tcp, "memory": memory, "gloo": gloo}[kind.name]
    finally:
        for each in opened:
            each.close()
        stores.clear()
