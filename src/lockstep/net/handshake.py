"""What two hosts tell each other first, and whether they may then compute together.

Facts are named texts: versions of packages, and digests of the code, of the data and of what a
few kernels compute. Hosts that differ in one would compute other bits; they are told apart here.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated, Literal

import msgspec

from lockstep.errors import RefusedError
from lockstep.net.frames import VERSION
from lockstep.system.messages import Codec, ErrorMessage, Message

Facts = Mapping[str, str]
MAX_FACTS, MAX_TEXT = 256, 256
"""How many facts a host may state, and characters of each name and value."""
Ascii = Annotated[str, msgspec.Meta(max_length=MAX_TEXT, pattern=r"\A[ -~]*\Z")]
"""A text that may go into a log."""
FactsMap = Annotated[dict[Ascii, Ascii], msgspec.Meta(max_length=MAX_FACTS)]
IpText = Annotated[str, msgspec.Meta(max_length=45, pattern=r"\A[0-9A-Fa-f:.]*\Z")]
PACKAGES = ("torch", "numpy", "lockstep-dlp")


class Hello(Message):
    """What a host says of itself."""

    job: Ascii
    node: Ascii
    """Its name. Where there are certificates, that of its certificate counts."""
    facts: FactsMap = msgspec.field(default_factory=dict)
    protocol: Annotated[int, msgspec.Meta(ge=0, le=255)] = VERSION
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """Where it listens; 0 if it does not say."""
    host: IpText = ""
    """The address at which it listens, if that is one and not all of them: on a machine with two
    networks it may connect from another."""
    stream: Literal["", "data", "control"] = ""
    """What the connection is to carry; empty where that is not for the sender to say."""

    def with_stream(self, stream: Literal["data", "control"]) -> Hello:
        """The same, for a connection that carries this."""
        return msgspec.structs.replace(self, stream=stream)


def peer_address(hello: Hello, source: str) -> tuple[str, int]:
    """Where a host can be reached that connects from the address `source`.

    Loopback is another machine's own: that counts only from there.
    """
    with contextlib.suppress(ValueError):
        named, seen = ipaddress.ip_address(hello.host), ipaddress.ip_address(source)
        if not named.is_unspecified and (not named.is_loopback or seen.is_loopback):
            return str(named), hello.port
    return source, hello.port


HELLO: Codec[Hello] = Codec(Hello, "a hello breaks the protocol")


class Refusal(Message):
    """Why a host or a newcomer is not let in."""

    error: ErrorMessage
    again: bool = False
    """Whether it may try again at once."""


REFUSAL: Codec[Refusal] = Codec(Refusal)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A fact in which two hosts differ. A fact that one does not state is empty there."""

    name: str
    ours: str
    theirs: str

    def __str__(self) -> str:
        return f"{self.name} is {self.theirs or 'not stated'} there, {self.ours or 'not'} here"


def gather(*, probe: str, code: str, data: str, fitted: str) -> dict[str, str]:
    """The facts of this host, with digests that the caller has taken."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {**versions, "probe": probe, "code": code, "data": data, "fitted": fitted}


def differences(ours: Facts, theirs: Facts) -> tuple[Difference, ...]:
    """Every fact that is not the same on both sides, by name."""
    return tuple(
        Difference(name=name, ours=ours.get(name, ""), theirs=theirs.get(name, ""))
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    )


def check_hello(ours: Hello, theirs: Hello, name: str) -> None:
    """Check that a host may take part; `name` is what its certificate says.

    Raises:
        RefusedError: it may not; says why, and names every fact that differs.
    """
    if theirs.protocol != ours.protocol:
        _refuse(name, f"protocol {ours.protocol}", f"protocol {theirs.protocol}")
    if theirs.job != ours.job:
        _refuse(name, f"job {ours.job}", f"job {theirs.job}")
    if theirs.node != name or name == ours.node:
        _refuse(name, f"a name of its own, {name} as in its certificate", theirs.node)
    check_facts(ours.facts, theirs.facts, name)


def check_facts(ours: Facts, theirs: Facts, name: str) -> None:
    """Check that a host would compute the same bits.

    Raises:
        RefusedError: it may not take part; names every fact that differs.
    """
    apart = differences(ours, theirs)
    if apart:
        raise RefusedError(
            f"host {name} may not take part: it would not compute the same bits",
            expected="the same packages, code, data and kernels on every host",
            found="; ".join(map(str, apart)),
            fix=f"make {', '.join(each.name for each in apart)} the same on both",
        )


def _refuse(name: str, expected: str, found: str) -> None:
    raise RefusedError(f"host {name} may not take part", expected=expected, found=found)
