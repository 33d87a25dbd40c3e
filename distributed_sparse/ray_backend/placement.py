"""The placement group in which an engine's client runs: its bundles, and what is unused of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import ray
from ray._private.worker import global_worker
from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group_table


@dataclass(frozen=True)
class ClientPlacement:
    """The placement group of the actor or task that makes an engine. Its ranks use that group's bundles, as in vLLM.

    Attributes:
        group: Ray's handle; it belongs to the user, so an engine never removes it.
        held: units per (resource, bundle) that the actor or task itself holds.
    """

    group: PlacementGroup
    held: dict[tuple[str, int], float]

    @classmethod
    def of_this_process(cls) -> ClientPlacement | None:
        """None outside of actors and tasks, and where they are in no placement group."""
        group = get_current_placement_group()
        if group is None:
            return None
        # Ray names the units of a bundle CPU_group_{bundle}_{group}; only the worker itself knows which bundle it is in
        held = {
            (match[1], int(match[2])): sum(amount for _, amount in amounts)
            for name, amounts in global_worker.core_worker.resource_ids().items()  # type: ignore[attr-defined]
            if (match := re.fullmatch(rf"(\w+)_group_(\d+)_{group.id.hex()}", name))
        }
        return cls(group, held)

    def total(self, resource: str) -> list[float]:
        """Units of a resource per bundle."""
        return [bundle.get(resource, 0.0) for bundle in self.group.bundle_specs]

    def unused(self, resource: str) -> list[float]:
        """Unused units of a resource per bundle."""
        # Ray's figures are some 100 ms old: they may count as unused what this client holds
        seen = ray.available_resources()
        return [
            min(total - self.held.get((resource, i), 0.0), seen.get(f"{resource}_group_{i}_{self.group.id.hex()}", 0.0))
            for i, total in enumerate(self.total(resource))
        ]

    def bundles_for(self, num_ranks: int, resource: str) -> list[int] | None:
        """A bundle with an unused unit for each rank, on as few nodes as possible; None: too few are unused.

        A bundle of several units takes several ranks.
        """
        nodes = placement_group_table(self.group)["bundles_to_node_id"]
        units = [i for i, unused in enumerate(self.unused(resource)) for _ in range(int(unused + 1e-9))]
        on_node = Counter(nodes[i] for i in units)
        units.sort(key=lambda i: (-on_node[nodes[i]], nodes[i], i))
        return units[:num_ranks] if len(units) >= num_ranks else None

    def describe(self, resource: str) -> str:
        """For an error: what each bundle has of a resource."""
        pairs = zip(self.unused(resource), self.total(resource), strict=True)
        bundles = ", ".join(f"bundle {i}: {unused:g} of {total:g}" for i, (unused, total) in enumerate(pairs))
        return f"the placement group in which this engine is made has unused {resource}s in {bundles}"
