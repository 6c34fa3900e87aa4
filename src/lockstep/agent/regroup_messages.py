"""Orders: what the master tells a host when the hosts have been regrouped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.coordinator.host_membership import Action


@dataclass(frozen=True, kw_only=True)
class Orders:
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
    def from_message(message: Mapping[str, Any]) -> Orders:
        addresses = {
            name: (str(host), int(port)) for name, (host, port) in message["addresses"].items()
        }
        names = ("step", "workers", "actions", "source")
        return Orders(addresses=addresses, **{name: message[name] for name in names})

    @property
    def copying(self) -> list[str]:
        """The hosts that get the state from the source."""
        return [name for name, action in self.actions.items() if action == "copy"]
