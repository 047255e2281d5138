"""What a checkpoint holds, and how long it takes to write and to read."""

from __future__ import annotations

from dataclasses import dataclass

from estimator.job.job import Job
from estimator.job.strategy import OPTIMIZER_STATES
from estimator.sharding.units import count_params, model_units, trained_units
from estimator.units import DTYPE_BYTES

STORAGE_BYTES_PER_S_PER_NODE = 1e9
"""Where no storage is described: 2 TB/s sustained for some 2,000 nodes, as Llama 3 trained with (arXiv 2407.21783, section 3.3.1)."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Bytes and seconds of one checkpoint of everything that training needs to go on."""

    total_bytes: int
    """Masters (or the parameters, where they are their own) and optimizer states; low-precision copies are made again from them."""
    n_writers: int
    """Ranks that hold different parts and write them at once."""
    rank_bytes: float
    """Of one writer."""
    write_s: float
    """Until the storage has all of it."""
    blocked_s: float
    """For which training stands still: all of ``write_s``, or the copy to host memory where the rest goes on beside training."""
    read_s: float
    """At a restart."""


def checkpoint_bytes(job: Job) -> int:
    """Bytes of masters and optimizer states of all parameters, each counted once.

    Parameters that are frozen have neither; they are counted in the model's dtype.
    """
    s = job.strategy
    units = model_units(job.model)
    n_params = count_params(units)
    n_trained = count_params(trained_units(units))
    per_trained = DTYPE_BYTES[s.masters] + OPTIMIZER_STATES[s.optimizer] * DTYPE_BYTES[s.states]
    return n_trained * per_trained + (n_params - n_trained) * DTYPE_BYTES[s.dtype]


def checkpoint_of(job: Job, *, storage_bytes_per_s: float, asynchronous: bool) -> Checkpoint:
    """A checkpoint of ``job`` to storage that takes ``storage_bytes_per_s`` from all nodes together.

    With ZeRO every data-parallel rank writes its own shard (of hybrid shards one replica's ranks do), parameter servers write their
    slices; otherwise one rank of each model-parallel place writes all.
    """
    cluster, s = job.cluster, job.strategy
    total = checkpoint_bytes(job)
    shards = (s.shard_size or job.mesh.n_data) if job.zero_stage else s.n_servers if s.has_servers else 1
    n_writers = shards * s.tp * s.pp
    rank_bytes = total / n_writers
    link = cluster.gpu.host_link_bytes_per_s
    copy_s = rank_bytes / link if link and not s.offload_optimizer else 0.0
    write_s = max(total / storage_bytes_per_s, copy_s)
    return Checkpoint(
        total_bytes=total,
        n_writers=n_writers,
        rank_bytes=rank_bytes,
        write_s=write_s,
        blocked_s=copy_s if asynchronous else write_s,
        read_s=write_s,
    )
