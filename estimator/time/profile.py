"""``HardwareProfile``: what a machine's chip, links and host really reach, and which profile serves a GPU.

A measured profile holds points and is read by interpolation. A published one holds the few constants of
``ChipModel`` and ``LinkModel`` (each with where it came from) beside the published points that support them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from estimator.errors import InputError
from estimator.job.cluster import Gpu, Host

PROFILE_DIR = Path(__file__).resolve().parent.parent / "catalog" / "profiles"

Origin = Literal["measured", "published", "default"]


class MatmulPoint(NamedTuple):
    """One (batched) matrix product, ``m x k`` by ``k x n``. ``spread`` everywhere: interquartile range / median."""

    dtype: str
    m: int
    n: int
    k: int
    flops_per_s: float
    batch: int = 1
    workers: int = 1
    """Processes that ran the same at once on the machine: CPUs share cores and memory bandwidth."""
    threads: int = 1
    spread: float = 0.0
    source: str = ""
    """Key into the profile's ``sources``."""
    layout: str = "nt"
    """Of row-major operands: ``nt`` (x W', a linear layer), ``nn`` (its input's gradient), ``tn`` (its weight's)."""


class AttentionPoint(NamedTuple):
    """Causal attention. The rate counts executed FLOPs (lower triangle; backward 2.5 x forward)."""

    dtype: str
    direction: str
    """``forward`` or ``backward``."""
    seq_len: int
    head_dim: int
    flops_per_s: float
    workers: int = 1
    threads: int = 1
    spread: float = 0.0
    source: str = ""
    n_heads: int = 0
    """Query heads and key/value heads; 0 where the source does not say."""
    n_kv_heads: int = 0


class BandwidthPoint(NamedTuple):
    """An operator bound by memory: ``kind`` is an ``Op``'s name or kind; bytes are those read plus those written."""

    kind: str
    dtype: str
    bytes: int
    bytes_per_s: float
    backward: bool = False
    workers: int = 1
    threads: int = 1
    spread: float = 0.0
    source: str = ""


class CollectivePoint(NamedTuple):
    """One collective; ``bytes`` is the full (unsharded) tensor."""

    op: str
    group_size: int
    n_nodes: int
    bytes: int
    seconds: float
    dtype: str = ""
    spread: float = 0.0
    source: str = ""


class CopyPoint(NamedTuple):
    """A copy between device and host memory, or within the device's."""

    direction: str
    """``h2d``, ``d2h``, ``both`` (those two at once) or ``d2d`` (device memory to device memory)."""
    bytes: int
    """Copied by all that ran at once: half of them each way where the direction is ``both``."""
    bytes_per_s: float
    pinned: bool = True
    workers: int = 1
    spread: float = 0.0
    source: str = ""


class HostPoint(NamedTuple):
    """Seconds and rates of one process while ``workers`` of them work at once on the host."""

    workers: int
    threads: int
    adam_elements_per_s: float
    """fp32 Adam on all its threads."""
    op_s: float
    """Issuing one operator."""
    autograd_op_s: float
    """What backward adds to that per operator."""
    spread: float = 0.0
    source: str = ""
    overlap: float = 0.0
    """CPU: share of a collective's seconds that arithmetic hides when both run at once."""


class OptimizerPoint(NamedTuple):
    """The runtime's offloaded AdamW step of one process on ``threads`` threads of the host: gradients widened and
    scaled, fp32 masters and states updated, new parameters written in ``dtype``."""

    threads: int
    dtype: str
    """Of gradients and parameters."""
    elements_per_s: float
    spread: float = 0.0
    source: str = ""


COMMIT = "commit"
"""Name of the overhead of making a version of an optimizer's files last: data and commit record synchronised, and renamed."""


class FilePoint(NamedTuple):
    """Direct (uncached) file input and output by ``queue`` threads, each with one block under way."""

    direction: str
    """``read``, ``write``, or ``checksum``: CRC-32 of blocks in memory, as of every block that is read or written."""
    block_bytes: int
    queue: int
    bytes_per_s: float
    spread: float = 0.0
    source: str = ""


class OverheadPoint(NamedTuple):
    """Seconds of something that moves no data to speak of."""

    name: str
    """``commit``: see ``COMMIT``; ``launch``: the host issues one kernel; ``kernel``: the device runs a kernel that does nothing, others queued
    behind it; ``cached_alloc``: the allocator hands out and takes back a block that it keeps; ``segment_alloc``: it
    gets a fresh segment of ``bytes`` from the driver."""
    seconds: float
    bytes: int = 0
    spread: float = 0.0
    source: str = ""


class StepPoint(NamedTuple):
    """One part of a step of a small job that this runtime trained here."""

    name: str
    """Of the job (``validator.calibrate.steps``)."""
    part: str
    """One of ``estimator.report.TIME_PARTS``, or ``step``: the whole."""
    seconds: float
    """Median."""
    forecast_s: float
    """With constants that the job took no part in."""
    workers: int = 1
    spread: float = 0.0


class StackPoint(NamedTuple):
    """What training makes of lone kernels, by the steps of as many processes at once."""

    workers: int
    constants: Mapping[str, float]
    """Of ``estimator.time.stack.Stack``."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The GPU on which published attention points were taken: turns their rates into fractions of a peak."""

    name: str
    peak_flops: Mapping[str, float]
    memory_bytes_per_s: float
    link_bytes_per_s: float
    host_link_bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class ChipModel:
    """Constants of a GPU's kernels; see ``estimator.time.operators`` for the formulas."""

    matmul_efficiency: Mapping[str, float]
    """Fraction of the dense peak that full waves of the largest tile with long K reach, per dtype."""
    k_ramp: int
    """Elements of K that filling and draining a tile's pipeline costs."""
    kernel_s: float
    """Device seconds of a kernel beyond its work: launch gap, ramp, tail."""
    memory_efficiency: float
    """Fraction of the datasheet's memory bandwidth that a large streaming kernel reaches."""
    copy_efficiency: float
    """Fraction of the host link that a large pinned copy reaches."""
    copy_s: float
    """Seconds of a copy beyond its bytes."""
    derivation: str
    quantization: float = 1.0
    """Share of a partly filled last wave of tiles that is lost: libraries split the tiles that remain, and chips under a power
    limit clock up while SMs idle."""


@dataclass(frozen=True, kw_only=True)
class LinkModel:
    """Constants of collectives; see ``estimator.time.collectives`` for the formulas."""

    ring_efficiency: float
    """Fraction of the intra-node link that large ring collectives reach (bus bandwidth / link)."""
    inter_efficiency: float
    """The same of the network between nodes."""
    in_switch_factor: float
    """All-reduce bandwidth with reduction in the switch over that of the ring; 1 where there is none."""
    in_switch_min_ranks: int
    launch_s: float
    """Floor of any collective: kernel launch and rendezvous."""
    intra_hop_s: Mapping[str, float]
    """Seconds per hop inside a node by protocol: ``low_latency``, ``ll128``, ``simple``; both mappings name those there are."""
    inter_hop_s: Mapping[str, float]
    inter_floor_s: float
    """Added once when a collective crosses nodes."""
    pipelining: float
    """Weight of the cross term of latency and bandwidth (chunked pipelines): 0 none, 1 the classical optimum."""
    derivation: str
    node_pipelining: float = 0.5
    """The same where nodes are crossed."""
    in_switch_rank_s: float = 2.5e-6
    """Latency of a reduction in the switch, per rank: 8 to 72 ranks of published rows."""
    peer_s: float = 7.5e-6
    """Latency of grouped sends and receives per peer: 8 x A100 all-to-all 87 us from 32 bytes to 2 MiB, 30 of them the floor's; 8 x B200 7.3."""
    socket_efficiency: float = 0.0
    """``ring_efficiency`` of PCIe groups behind one socket; 0: the same as across."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HardwareProfile:
    """What one kind of machine reaches. Compared by identity; use ``to_dict`` for equality of content."""

    name: str
    arch: str
    """As ``Gpu.arch``."""
    covers: tuple[str, ...] = ()
    """Catalogue names (or beginnings of names) that a shipped profile speaks for."""
    origin: Origin
    date: str
    """ISO date of the measurement, or of the day on which the published rows were collected."""
    host_name: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    """Key -> URL of what ``source`` fields name."""
    notes: tuple[str, ...] = ()
    gpu: Gpu | None = None
    """The measured machine's accelerator (a CPU: what its points reach); ``None`` for shipped profiles."""
    host: Host | None = None
    reference: Reference | None = None
    chip: ChipModel | None = None
    link: LinkModel | None = None
    matmul: tuple[MatmulPoint, ...] = ()
    attention: tuple[AttentionPoint, ...] = ()
    bandwidth: tuple[BandwidthPoint, ...] = ()
    collectives: tuple[CollectivePoint, ...] = ()
    copies: tuple[CopyPoint, ...] = ()
    host_points: tuple[HostPoint, ...] = ()
    optimizer_steps: tuple[OptimizerPoint, ...] = ()
    files: tuple[FilePoint, ...] = ()
    overheads: tuple[OverheadPoint, ...] = ()
    steps: tuple[StepPoint, ...] = ()
    stacks: tuple[StackPoint, ...] = ()
    """Constants with which ``steps`` are forecast best; empty: too few steps were measured."""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """What calibration did not measure -> why."""
    spread: Mapping[str, float] = field(default_factory=dict)
    """Relative uncertainty by kind (``matmul``, ``attention``, ``bandwidth``, ``collective``, ``copy``, ``host``).
    Measured: median interquartile range of the points. Published: root mean square of the logarithm of published
    rows over what these constants give; attention: of cuDNN's over FlashAttention-2's rows (which kernel runs is not
    known); host: of the two published rates. Doubled where the constants are borrowed from another GPU."""

    @property
    def is_measured(self) -> bool:
        return self.origin == "measured"

    def host_point(self, workers: int) -> HostPoint:
        """The host's figures with ``workers`` processes at once (the nearest measured number of them)."""
        assert self.host_points, f"profile {self.name} has no host points"
        return min(self.host_points, key=lambda p: (abs(p.workers - workers), p.workers))


@lru_cache(maxsize=64)
def _shipped(name: str) -> HardwareProfile:
    from estimator.time.profile_file import load_profile

    return load_profile(PROFILE_DIR / f"{name}.json")


@lru_cache(maxsize=1)
def _shipped_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in PROFILE_DIR.glob("*.json")))


def shipped_profiles() -> tuple[HardwareProfile, ...]:
    """The profiles that come with the package, in order of name; the first of an architecture is its default."""
    return tuple(_shipped(name) for name in _shipped_names())


def _own_profile(gpu: Gpu) -> HardwareProfile | None:
    """The shipped profile that speaks for ``gpu``; reads one file where its name says so already."""
    named = [name for name in _shipped_names() if gpu.name.startswith(name)]
    if named:
        return _shipped(max(named, key=len))
    own = [(len(prefix), p) for p in shipped_profiles() for prefix in p.covers if gpu.name.startswith(prefix)]
    return max(own, key=lambda pair: pair[0])[1] if own else None


NEAREST_ARCH: dict[str, tuple[str, ...]] = {
    "volta": ("volta", "ampere"),
    "turing": ("volta", "ampere"),
    "ampere": ("ampere", "hopper"),
    "ada": ("ada", "ampere"),
    "hopper": ("hopper", "ampere"),
    "blackwell": ("blackwell", "hopper"),
    "cdna2": ("cdna3", "ampere"),
    "cdna3": ("cdna3", "hopper"),
    "cdna4": ("cdna3", "hopper"),
}
"""Architectures whose curves stand in for one another, best first."""


def profile_for(gpu: Gpu, calibrated: HardwareProfile | None = None) -> tuple[HardwareProfile, tuple[str, ...]]:
    """The profile that serves ``gpu`` and notes on what the reader must know about it.

    A calibrated profile of the same GPU comes first; what it could not measure (collectives on a machine with one
    GPU) is filled from the shipped one. Then the shipped profile of that GPU, then its architecture's, then the
    nearest architecture's. Raises ``InputError`` for a GPU that none of them can stand for.
    """
    if calibrated is not None and calibrated.gpu is not None and calibrated.gpu.name == gpu.name:
        return _complete(calibrated, gpu)
    notes: tuple[str, ...] = ()
    if calibrated is not None:
        notes = (f"profile {calibrated.name!r} does not describe {gpu.name}; shipped curves are used",)
    own = _own_profile(gpu)
    if own is not None:
        other = (_scaled(gpu, own),) if own.arch != gpu.arch else ()
        return own, (*notes, *other, *own.notes)
    for arch in NEAREST_ARCH.get(gpu.arch, ()):
        for profile in shipped_profiles():
            if profile.arch == arch:
                return profile, (*notes, _scaled(gpu, profile), *profile.notes)
    hint = "run `zerocast calibrate` on it" if gpu.arch == "cpu" else f"known: {', '.join(sorted(NEAREST_ARCH))}"
    raise InputError(f"gpu {gpu.name!r} has architecture {gpu.arch!r}, for which there are no curves; {hint}")


def _scaled(gpu: Gpu, profile: HardwareProfile) -> str:
    return (
        f"{gpu.name} ({gpu.arch}) has no profile; the curves of {profile.name} ({profile.arch}) are scaled to its peaks"
    )


def _complete(calibrated: HardwareProfile, gpu: Gpu) -> tuple[HardwareProfile, tuple[str, ...]]:
    if gpu.arch == "cpu" or (calibrated.collectives and calibrated.chip is not None):
        return calibrated, calibrated.notes
    shipped, notes = profile_for(gpu)
    filled = replace(calibrated, link=calibrated.link or shipped.link, chip=calibrated.chip or shipped.chip)
    if calibrated.collectives:
        return filled, calibrated.notes
    return filled, (*calibrated.notes, f"collectives were not measured; those of {shipped.name} are used", *notes)
