"""What a model and a workload allow of tensor parallelism."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.errors import InputError

if TYPE_CHECKING:
    from estimator.job.model import ModelSpec
    from estimator.job.strategy import Strategy
    from estimator.job.workload import Workload


def check_tensor(model: ModelSpec, w: Workload, s: Strategy) -> None:
    """Raises ``InputError`` where ``s.tp`` ranks cannot share ``model``'s layers."""
    if s.tp == 1:
        return
    for field in ("n_heads", "n_kv_heads", "d_ff"):
        if getattr(model, field) % s.tp:
            raise InputError(f"tp is {s.tp}; allowed: a divisor of {field} = {getattr(model, field)} of {model.name}")
    if model.qk_norms in ("each", "all"):
        raise InputError(
            f"tp is {s.tp}, but queries' and keys' norms of {model.name} have weights for every head; allowed: 1"
        )
    held = -(-model.vocab_size // s.tp)
    if held * (s.tp - 1) >= model.vocab_size:
        raise InputError(
            f"tp is {s.tp}; allowed: fewer, so that each rank has a part of vocab_size = {model.vocab_size}"
        )
    if model.embed_dim not in (0, model.d_model):
        raise InputError(f"tp is {s.tp} with the projected embedding of {model.name}; allowed: 1")
    if s.sequence_parallel and w.micro_batch_size * (w.seq_len // s.cp) % s.tp:
        raise InputError(
            f"tp is {s.tp} with sequence_parallel and {w.micro_batch_size} * {w.seq_len // s.cp} tokens in a micro-batch; allowed: a "
            "divisor of these, or sequence_parallel false"
        )
    used = {
        "grad_compression": s.grad_compression != "none", "quantized_grads": s.quantized_grads > 0,
    }  # fmt: skip
    for name, is_used in used.items():
        if is_used:
            raise InputError(f"tp is {s.tp} with {name} {getattr(s, name)!r}; allowed: one of the two")
