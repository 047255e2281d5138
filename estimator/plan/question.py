"""``PlanQuestion``: what is fixed, and what may be chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, get_args

from estimator.errors import InputError, invalid, require_choice, require_int
from estimator.job import Cluster, ModelSpec, Strategy
from estimator.job.recompute import Recompute, canonical
from estimator.job.strategy import Offload

STAGES = (0, 1, 2, 3)
OFFLOADS: tuple[Offload, ...] = ("none", "optimizer", "optimizer,param")
"""What is searched unless others are named: files need rates that were measured on the machine."""
RECOMPUTES: tuple[str, ...] = get_args(Recompute)


@dataclass(frozen=True, kw_only=True)
class PlanQuestion:
    """One model on one cluster with one global batch; every listed way to run it is a candidate.

    Raises ``InputError`` when a list is empty, holds an impossible value, or the global batch cannot be spread.
    """

    model: ModelSpec
    cluster: Cluster
    seq_len: int
    """Tokens per sequence."""
    global_batch_size: int
    """Sequences per optimizer step over all GPUs."""
    base: Strategy = field(default_factory=Strategy)
    """Everything that is not searched: dtype, optimizer, parallel sizes, buckets."""
    zero_stages: tuple[int, ...] = STAGES
    offloads: tuple[Offload, ...] = OFFLOADS
    recomputes: tuple[str, ...] = RECOMPUTES
    micro_batch_sizes: tuple[int, ...] = ()
    """Sequences per GPU and pass to try; empty means every power of two up to one GPU's share of the batch."""

    def __post_init__(self) -> None:
        require_int("seq_len", self.seq_len)
        require_int("global_batch", self.global_batch_size)
        for name in ("zero_stages", "offloads", "recomputes"):
            if not getattr(self, name):
                raise invalid(name, getattr(self, name), "at least one choice")
        for stage in self.zero_stages:
            replace(self.base, zero_stage=stage)
        for offload in self.offloads:
            require_choice("offload", offload, get_args(Offload))
        for recompute in self.recomputes:
            canonical(recompute)
        for size in self.micro_batch_sizes:
            require_int("micro_batch", size)
        if self.cluster.n_gpus % self.base.model_parallel:
            raise InputError(
                f"tp * pp * cp is {self.base.model_parallel}; allowed: a divisor of gpus = {self.cluster.n_gpus}"
            )
        if self.global_batch_size % self.dp:
            near = max(self.dp, round(self.global_batch_size / self.dp) * self.dp)
            raise InputError(
                f"global_batch is {self.global_batch_size}; allowed: a multiple of the {self.dp} data-parallel GPUs, "
                f"the nearest is {near}"
            )

    @property
    def dp(self) -> int:
        """GPUs over which the batch is spread."""
        return self.cluster.n_gpus // self.base.model_parallel

    def strategies(self) -> Iterator[Strategy]:
        """Every distinct strategy; with one data-parallel GPU all stages are stage 0, and one of them is enough."""
        stages = self.zero_stages if self.dp > 1 else self.zero_stages[:1]
        for stage, offload, recompute in product(stages, self.offloads, self.recomputes):
            how: dict[str, Any] = {} if offload == "optimizer" else {"offload_fraction": 1.0, "delayed_update": False}
            if recompute not in ("selective", "full"):
                how["activation_offload"] = False
            yield replace(self.base, zero_stage=stage, offload=offload, recompute=recompute, **how)

    def micro_batches(self) -> tuple[int, ...]:
        """Micro-batch sizes to try, smallest first."""
        if self.micro_batch_sizes:
            return tuple(sorted(set(self.micro_batch_sizes)))
        per_gpu = self.global_batch_size // self.dp
        return tuple(1 << power for power in range(per_gpu.bit_length()))
