"""The optimizers: what each keeps for a parameter, what its step moves, and what goes with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from estimator.errors import InputError, require_choice

if TYPE_CHECKING:
    from estimator.job.strategy import Strategy

Optimizer = Literal["adamw", "adam", "sgd", "lion", "adagrad", "lamb", "adamw8bit", "adafactor", "muon"]


class OptimizerFacts(NamedTuple):
    n_states: int
    """State tensors with a number for every parameter."""
    step_bytes: float
    """Per element, moved by an fp32 step that is one kernel: gradient read, parameter and states read and written."""
    plain_bytes: float = 0
    """Moved by the step in plain torch where torch has no fused one; 0: it has."""
    flat: bool = True
    """All states are fp32 numbers, one for every parameter, and the step is the same for every element: it can be cut anywhere."""


OPTIMIZERS: dict[str, OptimizerFacts] = {
    "adamw": OptimizerFacts(2, 28),  # Loshchilov & Hutter 2019
    "adam": OptimizerFacts(2, 28),  # Kingma & Ba 2015
    "sgd": OptimizerFacts(1, 20),  # with momentum, Sutskever et al. 2013
    "lion": OptimizerFacts(1, 20, plain_bytes=138),  # Chen et al. 2023
    "adagrad": OptimizerFacts(1, 20, plain_bytes=104),  # Duchi et al. 2011
    # You et al. 2020: norms of every parameter and of its update between two passes
    "lamb": OptimizerFacts(2, 28 + 12, flat=False),
    # Dettmers et al. 2022: moments of 8 bits and an fp32 magnitude for every 256
    "adamw8bit": OptimizerFacts(2, 4 + 8 + 2 * 2 * (1 + 4 / 256), plain_bytes=420, flat=False),
    # Shazeer & Stern 2018, without momentum: sums of rows and columns of matrices; squares, two means, the outer product's root, update,
    # its norm, clipping and step are passes of their own (transformers' Adafactor)
    "adafactor": OptimizerFacts(0, 8 + 4 + 4 + 4 + 12 + 4 + 8 + 12, flat=False),
    # Jordan et al. 2024: momentum, made orthogonal, for matrices of blocks; AdamW for all else
    "muon": OptimizerFacts(1, 20 + 12, flat=False),
}

OptimizerImpl = Literal["fused", "foreach"]


class ForeachFacts(NamedTuple):
    """Of torch's ``foreach`` steps, list by list over all of a rank's parameters (``torch/optim/adam.py``, ``sgd.py``, ``adagrad.py``)."""

    n_lists: int
    """Of new tensors, as many and as large as the parameters, that are there at once (measured on torch 2.13)."""
    step_bytes: int
    """Moved per element of fp32: what every ``_foreach_`` call reads and writes."""


FOREACH: dict[str, ForeachFacts] = {
    "adamw": ForeachFacts(1, 80), "adam": ForeachFacts(1, 72), "sgd": ForeachFacts(0, 32), "adagrad": ForeachFacts(2, 52),
}  # fmt: skip

STATE_BLOCK = 256
"""Numbers of an 8-bit state that share one fp32 magnitude."""
MUON_ITERATIONS = 5
"""Of Newton and Schulz (Jordan et al. 2024), in bf16."""


def check_optimizer(s: Strategy) -> None:
    """Raises ``InputError``."""
    require_choice("optimizer", s.optimizer, get_args(Optimizer))
    require_choice("optimizer_impl", s.optimizer_impl, get_args(OptimizerImpl))
    if s.optimizer_impl == "foreach" and s.framework not in ("fsdp1", "fsdp2"):
        raise InputError(
            f"optimizer_impl is 'foreach' with framework {s.framework}, whose steps are kernels of its own; allowed: fused, or framework "
            "fsdp1 or fsdp2"
        )
    if s.optimizer_impl == "foreach" and s.optimizer not in FOREACH:
        raise InputError(f"optimizer_impl is 'foreach' with optimizer {s.optimizer!r}; allowed: {', '.join(FOREACH)}")
    if OPTIMIZERS[s.optimizer].flat:
        return
    for present, what, allowed in (
        (s.offload != "none", f"offload {s.offload!r}", "none"),
        (s.state_dtype == "model", "state_dtype 'model'", "fp32"),
        (s.grad_compression != "none", f"grad_compression {s.grad_compression!r}", "none"),
        (s.has_servers, "sync 'parameter_server'", "allreduce"),
    ):
        if present:
            raise InputError(
                f"optimizer is {s.optimizer!r} with {what}; allowed: {allowed}, or adamw, adam, sgd, lion, adagrad"
            )


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """How many matrices a parameter is, and their smaller and larger side; none where it is a vector."""
    if len(shape) < 2:
        return 0, 0, 0
    count = 1
    for size in shape[:-2]:
        count *= size
    return count, min(shape[-2:]), max(shape[-2:])


def orthogonal_flops(shape: tuple[int, ...]) -> float:
    """Of Muon's iterations on a parameter: with X of m x n, m <= n, ``A = X X^T``, ``B = b A + c A A`` and ``X = a X + B X``."""
    count, m, n = matrix_of(shape)
    return count * MUON_ITERATIONS * (4.0 * m * m * n + 2.0 * m * m * m)


def factored_numel(shape: tuple[int, ...]) -> int:
    """Numbers of Adafactor's second moment: a row's and a column's means of a matrix, all of a vector."""
    count, m, n = matrix_of(shape)
    return count * (m + n) if count else shape[0] if shape else 1
