"""``Traced``: a module of the user's own, as plain records of what one micro-batch of it does.

``runtime.tracing`` makes them; ``estimator.ops.traced`` turns them into units and their costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from estimator.errors import InputError, require_int

if TYPE_CHECKING:
    from estimator.job.cluster import Cluster
    from estimator.job.model import ModelSpec
    from estimator.job.strategy import Strategy
    from estimator.job.workload import Workload


class TracedOp(NamedTuple):
    """One operator: the fields of ``estimator.ops.operator.Op``."""

    name: str
    kind: str
    backward: bool
    dtype: str
    flops: float
    n_bytes: int
    shape: tuple[int, ...] = ()
    launches: int = 1


class Held(NamedTuple):
    """Device bytes of a category."""

    category: str
    n_bytes: int


class TracedPass(NamedTuple):
    """A unit's forward or backward pass: ``estimator.ops.cost.PassMemory``, and its operators in the order of execution."""

    ops: tuple[TracedOp, ...]
    peak: tuple[Held, ...]
    after: tuple[Held, ...]
    category_peak: tuple[Held, ...]


class TracedCost(NamedTuple):
    """Both passes of a unit; what is recomputed is apart from the backward pass's operators, but part of its memory."""

    forward: TracedPass
    backward: TracedPass
    recompute: tuple[TracedOp, ...]


class TracedParam(NamedTuple):
    """One parameter tensor."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True


class TracedUnit(NamedTuple):
    """A unit as ``runtime.units`` finds it; ``cost`` is its place among ``Traced.costs``."""

    name: str
    params: tuple[TracedParam, ...]
    borrows: tuple[int, ...]
    backward_reads: bool
    cost: int


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What was traced, and for which choices: they decide what autograd keeps, so that others need another trace."""

    units: tuple[TracedUnit, ...]
    costs: tuple[TracedCost, ...]
    """Units that do the same share one."""
    buffer_bytes: int
    """Of the module's buffers (running means of batch norms, tables)."""
    micro_batch_size: int
    """Samples of the example batch."""
    seq_len: int
    """Tokens of a sample; 1 where it is not made of tokens."""
    is_cpu: bool
    """Traced with a CPU's operators, else with a GPU's."""
    dtype: str
    grad_dtype: str
    recompute: str
    recompute_every: int
    attention: str
    kernels_off: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """What tracing could not know, for the report."""

    def __post_init__(self) -> None:
        require_int("model.traced.micro_batch_size", self.micro_batch_size)
        require_int("model.traced.seq_len", self.seq_len)
        require_int("model.traced.buffer_bytes", self.buffer_bytes, minimum=0)
        if not any(param.trained for unit in self.units for param in unit.params):
            raise InputError("model.traced has no unit with a trained parameter; there is nothing to train")
        for number, unit in enumerate(self.units):
            if not 0 <= unit.cost < len(self.costs):
                raise InputError(
                    f"model.traced.units.{number}.cost is {unit.cost}; allowed: 0 to {len(self.costs) - 1}"
                )
            if not all(0 <= other < number for other in unit.borrows):
                raise InputError(f"model.traced.units.{number}.borrows names a unit that is not before it")


CHOICES = ("dtype", "grad_dtype", "recompute", "recompute_every", "attention", "kernels_off")
"""Fields of ``Strategy`` that a trace is made for."""


def check_traced(model: ModelSpec, w: Workload, s: Strategy, cluster: Cluster) -> None:
    """Raises ``InputError`` where the job is another than the one that ``model.traced`` was traced for, or has what traced models
    do not have yet."""
    traced = model.traced
    if traced is None:
        return
    for field in CHOICES:
        if getattr(s, field) != getattr(traced, field):
            raise InputError(
                f"{field} is {getattr(s, field)!r}, but {model.name} was traced with {getattr(traced, field)!r}; "
                "allowed: that, or another trace"
            )
    if w.micro_batch_size != traced.micro_batch_size:
        raise InputError(
            f"micro_batch is {w.micro_batch_size}, but the example batch that {model.name} was traced with has "
            f"{traced.micro_batch_size}; allowed: that, or another trace"
        )
    if w.seq_len != traced.seq_len:
        raise InputError(
            f"seq_len is {w.seq_len}, but {model.name} was traced with {traced.seq_len}; allowed: that, or another trace"
        )
    if traced.is_cpu != (cluster.gpu.arch == "cpu"):
        was, other = ("a CPU's", "GPU") if traced.is_cpu else ("a GPU's", "CPU")
        raise InputError(
            f"{model.name} was traced with {was} operators, the job's device is a {other}; trace it for that"
        )
    for axis in ("tp", "pp", "cp", "ep"):
        if getattr(s, axis) > 1:
            raise InputError(
                f"{axis} is {getattr(s, axis)}, but {model.name} is a traced module, which only data parallelism spreads; "
                "allowed: 1"
            )
    for present, what in (
        (s.framework != "zerocast", f"framework is {s.framework}"),
        (s.matmul_dtype != "model", f"matmul_dtype is {s.matmul_dtype}"),
        (s.activation_offload, "activation_offload is on"),
        (s.sparse_embeddings, "sparse_embeddings is on"),
    ):
        if present:
            raise InputError(f"{what}, but {model.name} is a traced module, for which that is not forecast yet")
