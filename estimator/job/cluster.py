"""``Cluster``: the GPUs, their links and hosts, as datasheets give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from estimator.errors import InputError, require_int
from estimator.job.network import Network

LINK_KINDS = ("switch", "mesh", "pcie")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator as its datasheet describes it. Peaks are dense."""

    name: str
    """Catalogue key, e.g. ``"h100-sxm"``."""
    arch: str
    """Architecture whose curves are used when no profile exists: ``"hopper"``, ``"ampere"``, ``"cpu"``, ..."""
    memory_bytes: int
    """Total memory as the driver reports it."""
    memory_bytes_per_s: float
    peak_flops: Mapping[str, float]
    """Dense peak per dtype (``fp32``, ``tf32``, ``bf16``, ``fp16``, ``fp8``), FLOP/s; a missing dtype has no fast path."""
    n_sms: int
    l2_bytes: int
    link_bytes_per_s: float
    """Unidirectional bandwidth of one GPU to its peers in the node (NVLink, xGMI or PCIe)."""
    host_link_bytes_per_s: float
    """Unidirectional PCIe (or C2C) bandwidth between one GPU and host memory."""
    context_bytes: int = 0
    """Device memory that a process takes before the first tensor (CUDA context)."""
    link_kind: str = "switch"
    """What its peers in the node are behind: a ``switch`` that gives any group the full link, a ``mesh`` of links to one peer
    each (which together make ``link_bytes_per_s``), or ``pcie`` across the host's sockets."""
    tdp_watts: float = 0.0
    """Rated power of the board; 0: not known."""
    source: str = ""
    unsourced: tuple[str, ...] = ()
    """Fields whose figure came without a source."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """The server around the GPUs."""

    memory_bytes: int
    n_cores: int
    memory_bytes_per_s: float
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """``n_gpus`` equal GPUs in nodes of ``gpus_per_node``."""

    gpu: Gpu
    n_gpus: int
    gpus_per_node: int
    internode_bytes_per_s: float
    """Unidirectional network bandwidth per GPU between nodes."""
    host: Host
    unsourced: tuple[str, ...] = field(default=())
    network: Network = field(default_factory=Network)

    def __post_init__(self) -> None:
        require_int("gpus", self.n_gpus)
        require_int("gpus_per_node", self.gpus_per_node)
        if self.n_gpus > self.gpus_per_node and self.n_gpus % self.gpus_per_node:
            raise InputError(
                f"gpus is {self.n_gpus}; allowed: a multiple of gpus_per_node = {self.gpus_per_node}, or fewer than that"
            )
        domain = self.network.nvlink_domain
        if domain and domain % self.gpus_per_node:
            raise InputError(
                f"nvlink_domain is {domain}; allowed: a multiple of gpus_per_node = {self.gpus_per_node}, or 0 for one node"
            )

    @property
    def gpus_per_domain(self) -> int:
        """GPUs that reach each other by the fast links (NVLink, xGMI, PCIe): a node's, or a whole rack's."""
        return self.network.nvlink_domain or self.gpus_per_node

    @property
    def n_nodes(self) -> int:
        return max(1, self.n_gpus // self.gpus_per_node)
