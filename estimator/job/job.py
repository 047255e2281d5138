"""``Job`` = ``ModelSpec`` x ``Workload`` x ``Strategy`` x ``Cluster``, validated once, here."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from estimator.errors import InputError
from estimator.job.cluster import Cluster
from estimator.job.context import check_context
from estimator.job.encoder import check_encoder_strategy
from estimator.job.experts import check_expert_strategy
from estimator.job.grouping import check_ranks
from estimator.job.lora import check_lora_strategy
from estimator.job.mesh import Mesh
from estimator.job.model import ModelSpec
from estimator.job.operators import check_operators
from estimator.job.parallel import check_tensor
from estimator.job.patches import check_images
from estimator.job.pipeline import check_stages
from estimator.job.sparse import check_sparse_model
from estimator.job.strategy import Strategy
from estimator.job.tower import check_tower_strategy
from estimator.job.traced import check_traced
from estimator.job.workload import Workload

_IN_FIRST_RECORDS = frozenset(
    ("zero_stage", "offload", "recompute", "dtype", "optimizer", "tp", "pp", "cp", "ep", "bucket_bytes", "prefetch_depth",
     "grad_clip")
)  # fmt: skip
"""Fields of ``Strategy`` that every key holds; a younger one is held where it is not at its default, so that keys stay."""
_MODEL_IN_FIRST_RECORDS = frozenset(
    ("n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "max_positions", "positions",
     "position_rows", "rotary_fraction", "rope_theta", "norm", "norm_bias", "norm_eps", "activation", "gated_mlp",
     "qkv_bias", "attn_out_bias", "mlp_bias", "head_bias", "qk_norm", "sandwich_norms", "parallel_residual",
     "embedding_norm", "embed_dim", "final_norm", "pre_norm", "tied_embeddings", "sliding_window", "global_every")
)  # fmt: skip
"""The same of ``ModelSpec``."""


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
        check_traced(self.model, w, s, self.cluster)
        check_images(self.model, w)
        check_encoder_strategy(self.model, s)
        check_expert_strategy(self.model, s)
        check_tensor(self.model, w, s)
        check_context(self.model, w, s, self.cluster)
        check_sparse_model(self.model, s)
        check_lora_strategy(self.model, s)
        check_tower_strategy(self.model, s)
        check_operators(self.model, s, self.cluster)
        check_ranks(s, self.mesh.n_data)
        per_pass = w.micro_batch_size * self.dp
        if w.global_batch_size % per_pass:
            near = max(per_pass, round(w.global_batch_size / per_pass) * per_pass)
            raise InputError(
                f"global_batch is {w.global_batch_size}; allowed: a multiple of micro_batch * data-parallel GPUs = "
                f"{w.micro_batch_size} * {self.dp} = {per_pass}, the nearest is {near}"
            )
        check_stages(self.model, s, self.n_micro_batches)
        if self.model.positions == "learned" and w.seq_len > self.model.max_positions:
            raise InputError(
                f"seq_len is {w.seq_len}; allowed: at most {self.model.max_positions}, "
                f"the positions that {self.model.name} has learned"
            )

    @property
    def dp(self) -> int:
        """GPUs over which the batch is spread."""
        return self.cluster.n_gpus // self.strategy.model_parallel

    @property
    def mesh(self) -> Mesh:
        """Its ranks along the parallel axes."""
        s = self.strategy
        return Mesh(tp=s.tp, cp=s.cp, dp=self.dp, pp=s.pp)

    @property
    def zero_stage(self) -> int:
        """The stage in effect: 0 when one data-parallel GPU leaves nothing to shard."""
        return self.strategy.zero_stage if self.mesh.n_data > 1 else 0

    @property
    def n_micro_batches(self) -> int:
        """Forward/backward passes per optimizer step (gradient accumulation)."""
        return self.workload.global_batch_size // (self.workload.micro_batch_size * self.dp)

    @property
    def tokens_per_micro_batch(self) -> int:
        """Tokens of one GPU in one pass."""
        return self.workload.micro_batch_size * self.workload.seq_len // self.strategy.cp

    @property
    def key(self) -> str:
        """Stable identity (16 hex digits) on which predictions and measurements are joined.

        Holds what decides the step (model shape, workload, strategy, GPU, sizes), not where figures came from.
        """
        model = first_choices(self.model) | young_choices(self.model)
        cluster = {
            "gpu": self.cluster.gpu.name,
            "n_gpus": self.cluster.n_gpus,
            "gpus_per_node": self.cluster.gpus_per_node,
        }
        strategy = first_choices(self.strategy) | young_choices(self.strategy)
        text = json.dumps([model, asdict(self.workload), strategy, cluster], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _in_first_records(part: Strategy | ModelSpec) -> frozenset[str]:
    return _IN_FIRST_RECORDS if isinstance(part, Strategy) else _MODEL_IN_FIRST_RECORDS


def first_choices(part: Strategy | ModelSpec) -> dict[str, Any]:
    """Fields that the first records have, without names."""
    return {name: getattr(part, name) for name in _in_first_records(part)}


def young_choices(part: Strategy | ModelSpec) -> dict[str, Any]:
    """Fields younger than the first records that are not at their defaults, nested ones as plain data."""
    first = _in_first_records(part) | {"name", "family"}
    young = [f.name for f in fields(part) if f.name not in first and getattr(part, f.name) != f.default]
    plain = asdict(part) if young else {}
    return {name: plain[name] for name in young}
