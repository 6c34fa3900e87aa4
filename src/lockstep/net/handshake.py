"""What two hosts tell each other first, and whether they may then compute together.

Facts are named texts: versions of packages, and digests of the code, of the data and of what a
few kernels compute. Hosts that differ in one would compute other bits; they are told apart here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from lockstep.errors import ProtocolError, RefusedError
from lockstep.net.frames import VERSION, Message

Facts = Mapping[str, str]
MAX_FACTS, MAX_TEXT = 256, 256
"""How many facts a host may state, and characters of each name and value."""
PACKAGES = ("torch", "numpy", "lockstep-dlp")


@dataclass(frozen=True, kw_only=True)
class Hello:
    """What a host says of itself."""

    job: str
    node: str
    """Its name. Where there are certificates, that of its certificate counts."""
    facts: Facts = field(default_factory=dict)
    protocol: int = VERSION
    port: int = 0
    """Where it listens, at the address that it connects from; 0 if it does not say."""

    def to_message(self) -> Message:
        """JSON-ready."""
        return {
            "protocol": self.protocol,
            "job": self.job,
            "node": self.node,
            "facts": dict(self.facts),
            "port": self.port,
        }


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


def parse_hello(message: Mapping[str, Any]) -> Hello:
    """The hello in a message.

    Raises:
        ProtocolError: a field is missing, too long, or of another type.
    """
    facts = message.get("facts")
    texts = [message.get("job"), message.get("node")]
    if isinstance(facts, dict) and len(facts) <= MAX_FACTS:
        texts += [*facts.keys(), *facts.values()]
        protocol, port = message.get("protocol"), message.get("port", 0)
        if type(protocol) is int and _is_port(port) and all(_is_text(text) for text in texts):
            job, node = message["job"], message["node"]
            return Hello(job=job, node=node, facts=facts, protocol=protocol, port=port)
    raise ProtocolError(
        "a hello breaks the protocol",
        expected=f"protocol, job, node, port and at most {MAX_FACTS} facts, "
        f"in printable texts of at most {MAX_TEXT} characters",
        found=ascii(message)[:MAX_TEXT],
    )


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


def _is_text(value: object) -> bool:
    return (
        isinstance(value, str)
        and len(value) <= MAX_TEXT
        and value.isascii()
        and value.isprintable()  # it may go into a log
    )


def _is_port(value: object) -> bool:
    return type(value) is int and 0 <= value < 65536


def _refuse(name: str, expected: str, found: str) -> None:
    raise RefusedError(f"host {name} may not take part", expected=expected, found=found)
