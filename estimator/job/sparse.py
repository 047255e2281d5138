"""Where the gradients of a token embedding can be exchanged row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.errors import InputError, invalid

if TYPE_CHECKING:
    from estimator.job.model import ModelSpec
    from estimator.job.strategy import Strategy


def check_sparse(s: Strategy) -> None:
    """Raises ``InputError`` for fields of ``s`` that do not go together."""
    if not isinstance(s.sparse_embeddings, bool):
        raise invalid("sparse_embeddings", s.sparse_embeddings, "true or false")
    if not s.sparse_embeddings:
        return
    if s.zero_stage > 1 or s.shard_size or s.grad_compression != "none" or s.model_parallel * s.ep > 1:
        raise InputError(
            f"sparse_embeddings is on with zero {s.zero_stage}, shard_size {s.shard_size}, grad_compression {s.grad_compression!r} and "
            f"tp * pp * cp * ep = {s.model_parallel * s.ep}; allowed: zero 0 or 1 with data parallelism alone and exact sums over all"
        )


def check_sparse_model(model: ModelSpec, s: Strategy) -> None:
    """Raises ``InputError`` where ``model`` has no table that only look-ups read."""
    if s.sparse_embeddings and (model.tied_embeddings or model.encoder is not None):
        what = "an encoder" if model.encoder is not None else "a head that is tied to its embedding"
        raise InputError(
            f"sparse_embeddings is on, but {model.name} has {what}; allowed: decoders with an embedding of its own"
        )
