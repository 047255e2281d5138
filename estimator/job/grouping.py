"""What a ``Strategy`` may say of groups of ranks and of compression, and what a number of ranks allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.errors import InputError, invalid, require_int
from estimator.job.sparse import check_sparse

if TYPE_CHECKING:
    from estimator.job.strategy import Strategy


def check_groups(s: Strategy) -> None:
    """Raises ``InputError`` for fields of ``s`` that do not go together."""
    if require_int("shard_size", s.shard_size, minimum=0) and (s.zero_stage == 0 or s.shard_size == 1):
        raise InputError(
            f"shard_size is {s.shard_size} with zero {s.zero_stage}; allowed: 0 (all data-parallel ranks), or with "
            "zero 1, 2 or 3 at least 2"
        )
    if not isinstance(s.quantized_weights, bool):
        raise invalid("quantized_weights", s.quantized_weights, "true or false")
    if require_int("secondary_shard", s.secondary_shard, minimum=0) == 1:
        raise invalid("secondary_shard", 1, "0 (none), or at least 2")
    for field in ("quantized_weights", "secondary_shard"):
        value = getattr(s, field)
        if value and (s.zero_stage != 3 or s.offload_param):
            raise InputError(
                f"{field} is {value} with zero {s.zero_stage} and offload {s.offload!r}; allowed: only where parameters are "
                "gathered from GPUs (zero 3, parameters not offloaded)"
            )
    if require_int("quantized_grads", s.quantized_grads, minimum=0) == 1:
        raise invalid("quantized_grads", 1, "0 (not), or at least 2")
    if s.quantized_grads and (s.zero_stage < 2 or s.shard_size):
        raise InputError(
            f"quantized_grads is {s.quantized_grads} with zero {s.zero_stage} and shard_size {s.shard_size}; allowed: zero 2 or "
            "3 without shard_size"
        )
    if s.grad_compression != "none" and (s.zero_stage > 1 or s.shard_size or s.dtype == "fp16"):
        raise InputError(
            f"grad_compression is {s.grad_compression!r} with zero {s.zero_stage}, shard_size {s.shard_size} and dtype {s.dtype}; "
            "allowed: zero 0 or 1 without shard_size, dtype bf16 or fp32 (what is lost would outlive a change of fp16's loss scale)"
        )
    _check_warmup(s)
    check_sparse(s)


def _check_warmup(s: Strategy) -> None:
    if not require_int("compression_warmup_steps", s.compression_warmup_steps, minimum=0):
        return
    if s.grad_compression != "one_bit" or s.delayed_update or s.offload_nvme:
        raise InputError(
            f"compression_warmup_steps is {s.compression_warmup_steps} with grad_compression {s.grad_compression!r}, offload "
            f"{s.offload!r} and delayed_update {s.delayed_update}; allowed: 0, or with grad_compression 'one_bit', not in files, not delayed"
        )
    if s.compresses_momentum and s.grad_clip:
        raise InputError(
            f"grad_clip is {s.grad_clip} with compression_warmup_steps {s.compression_warmup_steps} and zero 0; allowed: 0, as after the "
            "warm-up momentum is exchanged and no gradients' norm is known"
        )


def check_ranks(s: Strategy, dp: int) -> None:
    """Raises ``InputError`` where ``dp`` data-parallel ranks cannot be divided as ``s`` says."""
    if s.shard_size and dp % s.shard_size:
        raise InputError(f"shard_size is {s.shard_size}; allowed: a divisor of the {dp} data-parallel GPUs")
    if s.quantized_grads and dp % s.quantized_grads:
        raise InputError(f"quantized_grads is {s.quantized_grads}; allowed: a divisor of the {dp} data-parallel GPUs")
    if dp % s.ep:
        raise InputError(f"ep is {s.ep}; allowed: a divisor of the {dp} data-parallel GPUs")
    if s.has_servers and s.n_servers > dp:
        raise InputError(f"n_servers is {s.n_servers}; allowed: at most {dp}, the data-parallel GPUs")
    sharing = s.shard_size or dp
    if s.secondary_shard and sharing % s.secondary_shard:
        raise InputError(
            f"secondary_shard is {s.secondary_shard}; allowed: a divisor of the {sharing} GPUs that share a copy of the model"
        )


def rounding_fields(s: Strategy) -> list[str]:
    """Fields of ``s`` in use that round what ranks exchange, so that training is near exact training but not equal to it."""
    used = {
        "quantized_weights": s.quantized_weights,
        "quantized_grads": s.quantized_grads > 0,
        "grad_compression": s.grad_compression != "none",
    }
    return [field for field, is_used in used.items() if is_used]
