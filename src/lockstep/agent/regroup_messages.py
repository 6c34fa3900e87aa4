"""Regroup messages: what hosts and master tell each other when the hosts are regrouped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class RegroupOrder:
    """How a host goes on after a regrouping."""

    step: int
    workers: Mapping[str, int]
    """By host, in the order in which they share out the shards."""
    addresses: Mapping[str, tuple[str, int]]
    actions: Mapping[str, Action]
    source: str
    """Whom the state is copied from."""

    def to_message(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> RegroupOrder:
        addresses = {
            name: (str(host), int(port)) for name, (host, port) in message["addresses"].items()
        }
        names = ("step", "workers", "actions", "source")
        return RegroupOrder(addresses=addresses, **{name: message[name] for name in names})

    @property
    def copying(self) -> list[str]:
        """The hosts that get the state from the source."""
        return [name for name, action in self.actions.items() if action == "copy"]


@dataclass(frozen=True, kw_only=True)
class HostStatus:
    """In what state a host is at rest."""

    whole: int | None
    """After how many steps its state is; None: it is torn, or not there yet."""
    base: int | None
    """The same of its base; None: it has none."""
    address: tuple[str, int] = ("", 0)
    """Where it listens to other hosts in this generation."""

    def to_message(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"whole": self.whole, "base": self.base, "address": list(self.address)}

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> HostStatus:
        host, port = message["address"]
        return HostStatus(
            whole=message["whole"], base=message["base"], address=(str(host), int(port))
        )


Action = Literal["keep", "back", "copy"]
"""The state stays; the base is put back; it is copied from the source."""
