"""``Job`` = ``ModelSpec`` x ``Workload`` x ``Strategy`` x ``Cluster``, validated once, here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from estimator.errors import InputError
from estimator.job.cluster import Cluster
from estimator.job.grouping import check_ranks
from estimator.job.model import ModelSpec
from estimator.job.strategy import Strategy
from estimator.job.workload import Workload

_IN_FIRST_RECORDS = frozenset(
    ("zero_stage", "offload", "recompute", "dtype", "optimizer", "tp", "pp", "cp", "ep", "bucket_bytes", "prefetch_depth",
     "grad_clip")
)  # fmt: skip
"""Fields of ``Strategy`` that every key holds; a younger one is held where it is not at its default, so that keys stay."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training job. A ``Job`` that exists is consistent: sizes divide, the model takes the sequence.

    Raises ``InputError`` with the offending fields otherwise.
    """

    model: ModelSpec
    workload: Workload
    strategy: Strategy
    cluster: Cluster

    def __post_init__(self) -> None:
        s, w, n_gpus = self.strategy, self.workload, self.cluster.n_gpus
        if n_gpus % s.model_parallel:
            raise InputError(
                f"tp * pp * cp is {s.tp} * {s.pp} * {s.cp} = {s.model_parallel}; allowed: a divisor of gpus = {n_gpus}"
            )
        for axis, word in (("tp", "tensor"), ("pp", "pipeline"), ("cp", "context"), ("ep", "expert")):
            if getattr(s, axis) > 1:
                raise InputError(f"{axis} is {getattr(s, axis)}; {word} parallelism is not forecast yet, allowed: 1")
        check_ranks(s, self.dp)
        per_pass = w.micro_batch_size * self.dp
        if w.global_batch_size % per_pass:
            near = max(per_pass, round(w.global_batch_size / per_pass) * per_pass)
            raise InputError(
                f"global_batch is {w.global_batch_size}; allowed: a multiple of micro_batch * data-parallel GPUs = "
                f"{w.micro_batch_size} * {self.dp} = {per_pass}, the nearest is {near}"
            )
        if self.model.positions == "learned" and w.seq_len > self.model.max_positions:
            raise InputError(
                f"seq_len is {w.seq_len}; allowed: at most {self.model.max_positions}, "
                f"the positions that {self.model.name} has learned"
            )

    @property
    def dp(self) -> int:
        """GPUs over which the batch is spread and ZeRO shards."""
        return self.cluster.n_gpus // self.strategy.model_parallel

    @property
    def zero_stage(self) -> int:
        """The stage in effect: 0 when one data-parallel GPU leaves nothing to shard."""
        return self.strategy.zero_stage if self.dp > 1 else 0

    @property
    def n_micro_batches(self) -> int:
        """Forward/backward passes per optimizer step (gradient accumulation)."""
        return self.workload.global_batch_size // (self.workload.micro_batch_size * self.dp)

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens of one GPU in one pass."""
        return self.workload.micro_batch_size * self.workload.seq_len

    @property
    def key(self) -> str:
        """Stable identity (16 hex digits) on which predictions and measurements are joined.

        Holds what decides the step (model shape, workload, strategy, GPU, sizes), not where figures came from.
        """
        model = {k: v for k, v in asdict(self.model).items() if k not in ("name", "family")}
        cluster = {
            "gpu": self.cluster.gpu.name,
            "n_gpus": self.cluster.n_gpus,
            "gpus_per_node": self.cluster.gpus_per_node,
        }
        strategy = {name: getattr(self.strategy, name) for name in _IN_FIRST_RECORDS} | young_choices(self.strategy)
        text = json.dumps([model, asdict(self.workload), strategy, cluster], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def young_choices(strategy: Strategy) -> dict[str, Any]:
    """Fields younger than the first records that are not at their defaults."""
    young = {f.name: f.default for f in fields(Strategy) if f.name not in _IN_FIRST_RECORDS}
    return {name: value for name, default in young.items() if (value := getattr(strategy, name)) != default}
