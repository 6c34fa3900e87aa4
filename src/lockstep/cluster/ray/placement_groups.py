"""Placement groups: how Ray keeps CPUs for agents, a bundle on each node."""

from __future__ import annotations

from typing import Any

from lockstep.cluster.ray.node_agents import Node

NODE_LABEL = "ray.io/node-id"


class NodeBundles:
    """The bundles of the nodes, by their ids. Used by one thread."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._bundles: dict[str, tuple[Any, int]] = {}
        """A placement group, and the index of the node's bundle."""

    def reserve(self, nodes: tuple[Node, ...]) -> None:
        """Have Ray keep all CPUs of these nodes: one group, with one bundle on each."""
        group = self._ray.util.placement_group(
            [{"CPU": node.workers} for node in nodes],
            strategy="STRICT_SPREAD" if len(nodes) > 1 else "STRICT_PACK",
            bundle_label_selector=[{NODE_LABEL: node.id} for node in nodes],
        )
        self._bundles |= {node.id: (group, index) for index, node in enumerate(nodes)}

    def strategy(self, node: str) -> Any:
        """The scheduling strategy of an actor that belongs on a node."""
        group, index = self._bundles[node]
        strategies = self._ray.util.scheduling_strategies
        return strategies.PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=index
        )

    def forget(self, node: str) -> None:
        """Give up a node that is gone, and its group when no node of that is left."""
        group, _ = self._bundles.pop(node)
        if all(group is not other for other, _ in self._bundles.values()):
            self._ray.util.remove_placement_group(group)

    def close(self) -> None:
        """Give up all."""
        for node in tuple(self._bundles):
            self.forget(node)
