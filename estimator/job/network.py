"""``Network``: how a cluster's GPUs are joined, level by level, beyond one bandwidth inside nodes and one between them."""

from __future__ import annotations

from dataclasses import dataclass, fields

from estimator.errors import InputError, require_int
from estimator.job.fields import number, refuse


@dataclass(frozen=True, kw_only=True)
class Network:
    """Levels above the node. The defaults are one non-blocking network with as many links as GPUs.

    ``Cluster.internode_bytes_per_s`` stays each GPU's share of its node's network cards, however many there are.
    """

    nvlink_domain: int = 0
    """GPUs that one NVLink switch fabric joins, where that is more than a node (72 in GB200 NVL72 with nodes of 4); 0: a node."""
    nodes_per_leaf: int = 0
    """Nodes that meet at one leaf switch (of one rail, where there are rails); 0: all, nothing crosses a spine."""
    oversubscription: float = 1.0
    """Bandwidth of a leaf switch towards its nodes over that towards the spine."""
    rail_optimized: bool = False
    """The i-th cards of nodes share a leaf: what goes to another rail first goes to the right card's GPU inside the node (NCCL's PXN)."""
    in_network_reduction: bool = False
    """Network switches add up all-reduces (SHARP)."""
    hierarchical: bool = False
    """All-gathers and reduce-scatters go across nodes and inside them in two steps (Zhang et al. 2022, MiCS, section 3.3); NCCL
    itself sends them round one ring."""

    def __post_init__(self) -> None:
        require_int("nvlink_domain", self.nvlink_domain, 0)
        require_int("nodes_per_leaf", self.nodes_per_leaf, 0)
        if not 1 <= number("oversubscription", self.oversubscription) <= 1000:
            raise refuse("oversubscription", self.oversubscription, "a number from 1 to 1000")
        if self.oversubscription > 1 and not self.nodes_per_leaf:
            raise InputError(
                f"oversubscription is {self.oversubscription:g} without nodes_per_leaf; allowed: both, as it applies between leaves"
            )

    @property
    def is_plain(self) -> bool:
        """Nothing but the defaults."""
        return all(getattr(self, f.name) == f.default for f in fields(self))
