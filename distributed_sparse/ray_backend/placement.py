"""placement: the placement group that an engine's client runs in, its bundles, and their unused resources."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import ray
from ray._private.worker import global_worker
from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group_table


@dataclass(frozen=True)
class ClientPlacement:
    """The placement group of the actor or task that creates an engine. As in vLLM, the ranks use that group's bundles.

    Attributes:
        group: Ray's handle. The group belongs to the user, so an engine never removes it.
        held: units per (resource, bundle) used by the actor or task itself.
    """

    group: PlacementGroup
    held: dict[tuple[str, int], float]

    @classmethod
    def of_this_process(cls) -> ClientPlacement | None:
        """The placement group of the current actor or task; None if there is none."""
        group = get_current_placement_group()
        if group is None:
            return None
        # Ray names a bundle's units CPU_group_{bundle}_{group}; only the worker knows which bundle it runs in
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
        # Ray's figures lag by some 100 ms: they may show as unused what this client holds
        seen = ray.available_resources()
        return [
            min(total - self.held.get((resource, i), 0.0), seen.get(f"{resource}_group_{i}_{self.group.id.hex()}", 0.0))
            for i, total in enumerate(self.total(resource))
        ]

    def bundles_for(self, num_ranks: int, resource: str) -> list[int] | None:
        """One bundle with an unused unit per rank, on as few nodes as possible; None if too few are unused.

        A bundle with several units can take several ranks.
        """
        nodes = placement_group_table(self.group)["bundles_to_node_id"]
        units = [i for i, unused in enumerate(self.unused(resource)) for _ in range(int(unused + 1e-9))]
        on_node = Counter(nodes[i] for i in units)
        units.sort(key=lambda i: (-on_node[nodes[i]], nodes[i], i))
        return units[:num_ranks] if len(units) >= num_ranks else None

    def describe(self, resource: str) -> str:
        """The unused and total units per bundle, for error messages."""
        pairs = zip(self.unused(resource), self.total(resource), strict=True)
        bundles = ", ".join(f"bundle {i}: {unused:g} of {total:g}" for i, (unused, total) in enumerate(pairs))
        return f"the placement group in which this engine is made has unused {resource}s in {bundles}"
