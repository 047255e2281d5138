"""What a ``Strategy`` may say of parameter servers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from estimator.errors import InputError, require_choice, require_int

if TYPE_CHECKING:
    from estimator.job.strategy import Strategy

Sync = Literal["allreduce", "parameter_server"]


def check_servers(s: Strategy) -> None:
    """Raises ``InputError``."""
    require_choice("sync", s.sync, get_args(Sync))
    require_int("n_servers", s.n_servers)
    require_int("staleness", s.staleness, minimum=0)
    if not s.has_servers:
        if s.n_servers != 1 or s.staleness:
            raise InputError(
                f"n_servers is {s.n_servers} and staleness {s.staleness} with sync {s.sync!r}; allowed: 1 and 0, or others with sync "
                "'parameter_server'"
            )
        return
    if s.zero_stage or s.offload != "none":
        raise InputError(
            f"sync is {s.sync!r} with zero {s.zero_stage} and offload {s.offload!r}; allowed: zero 0 and offload 'none', as servers "
            "share the optimizer's states"
        )
    if s.grad_compression != "none" or s.sparse_embeddings:
        raise InputError(
            f"sync is {s.sync!r} with grad_compression {s.grad_compression!r} and sparse_embeddings {s.sparse_embeddings}; allowed: "
            "'none' and false, as gradients are pushed whole"
        )
    if s.model_parallel > 1 or s.ep > 1:
        raise InputError(
            f"sync is {s.sync!r} with tp {s.tp}, pp {s.pp}, cp {s.cp} and ep {s.ep}; allowed: 1 for each, as every rank pushes gradients of "
            "the whole model"
        )
    if s.staleness and s.dtype == "fp16":
        raise InputError(
            f"staleness is {s.staleness} with dtype 'fp16'; allowed: 0, or dtype bf16 or fp32 (late gradients would outlive a change of "
            "fp16's loss scale)"
        )
