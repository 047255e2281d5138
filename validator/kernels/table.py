"""Every memory-bound operator of a training step: what the estimator counts for it, and how to call it.

Counts come from the estimator's operators (``estimator.ops``), calls from the runtime (``validator.kernels.calls``).
This module needs no torch; ``Kernel.prepare`` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimator.errors import InputError, require_choice, require_int, unknown_choice
from estimator.ops import streaming
from estimator.ops.graph import Graph
from estimator.ops.operator import Op
from estimator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from validator.kernels.calls import Prepared

ALL = ("bf16", "fp16", "fp32")
LOW = ("bf16", "fp16")
SMALL_TENSORS = 256
"""Most tensors that ``flatten`` and ``unflatten`` copy."""
_MIN_WIDTH = 64

Count = Callable[[str, int, int], tuple[Op, ...]]
"""From dtype, rows and width of the main operand to the operators that the estimator has for it."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One operator in one direction."""

    name: str
    backward: bool
    dtypes: tuple[str, ...]
    """Of the main operand."""
    count: Count
    max_width: int = 4096
    aspect: int = 1
    """About how many times wider than high the main operand is, until ``max_width``."""

    def ops(self, shape: tuple[int, ...], dtype: str) -> tuple[Op, ...]:
        """The estimator's operators for a main operand of ``shape`` ``(rows, width)``, in order."""
        rows, width = shape
        return self.count(require_choice("dtype", dtype, self.dtypes), rows, width)

    def n_bytes(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes read plus written by the estimator's count."""
        return sum(op.n_bytes for op in self.ops(shape, dtype))

    def shape_for(self, n_bytes: int, dtype: str) -> tuple[int, int]:
        """The shape of the main operand with which one call moves about ``n_bytes`` by the estimator's count."""
        require_int("n_bytes", n_bytes)
        sample = (1 << 10, 1 << 10)
        numel = max(1, round(n_bytes * math.prod(sample) / self.n_bytes(sample, dtype)))
        side = 2 ** int(math.log2(numel) / 2)
        width = max(_MIN_WIDTH, min(self.max_width, self.aspect * side))
        return max(1, round(numel / width)), width

    def prepare(self, size: int | tuple[int, ...], dtype: str, device: str, implementation: str = "torch") -> Prepared:
        """Operands on ``device`` (a torch device) and the call. ``size``: bytes to move, or the main operand's shape.

        Raises ``InputError`` for a dtype that the kernel has not, or an implementation that is not there.
        """
        from validator.kernels.calls import prepare

        return prepare(
            self, self.shape_for(size, dtype) if isinstance(size, int) else size, dtype, device, implementation
        )


def kernel(name: str, backward: bool = False) -> Kernel:
    """The entry of that name and direction. Raises ``InputError``."""
    found = [entry for entry in KERNELS if entry.name == name]
    if not found:
        raise unknown_choice("kernel", name, {entry.name for entry in KERNELS})
    for entry in found:
        if entry.backward == backward:
            return entry
    raise InputError(f"kernel {name!r} has no {'backward' if backward else 'forward'} pass of its own")


def _in_graph(build: Callable[[Graph, int], object], backward: bool) -> Count:
    """Counts what ``build`` writes into a unit's graph. A weight's gradient is not yet added to its bucket."""

    def count(dtype: str, rows: int, width: int) -> tuple[Op, ...]:
        graph = Graph(dtype, rows)
        build(graph, width)
        nodes = reversed(graph.nodes) if backward else graph.nodes
        ops = [op for node in nodes for op in (node.backward if backward else node.forward)]
        return tuple(op for op in ops if op.name != "accumulate_grad")

    return count


def _both(name: str, build: Callable[[Graph, int], object], max_width: int = 4096, aspect: int = 1) -> list[Kernel]:
    return [
        Kernel(
            name=name, backward=backward, dtypes=ALL, count=_in_graph(build, backward), max_width=max_width,
            aspect=aspect,
        )
        for backward in (False, True)
    ]  # fmt: skip


def _one(name: str, count: Count, dtypes: tuple[str, ...] = ALL, backward: bool = False) -> Kernel:
    return Kernel(name=name, backward=backward, dtypes=dtypes, count=count)


def _add(g: Graph, width: int) -> None:
    g.add(g.activation(width), g.activation(width), width)


def _gated(g: Graph, width: int) -> None:
    g.gated_activate(g.activation(width), g.activation(width), width)


def _norm(rms: bool, residual: bool = False) -> Callable[[Graph, int], object]:
    def build(g: Graph, width: int) -> None:
        x = g.activation(width)
        g.norm(g.add(x, g.activation(width), width) if residual else x, width, rms=rms, bias=not rms)

    return build


def _accumulate(dtype: str, rows: int, width: int) -> tuple[Op, ...]:
    graph = Graph(dtype, 0)
    graph.embedding(0, width, rows)
    return tuple(op for op in graph.nodes[0].backward if op.name == "accumulate_grad")


def embedding_table_rows(rows: int) -> int:
    """Rows of the table in which ``rows`` are looked up here: every row about four times."""
    return max(1, rows // 4)


KERNELS: tuple[Kernel, ...] = (
    _one("copy", lambda dtype, rows, width: (streaming.copy(dtype, rows * width),)),
    _one("cast_to_fp32", lambda dtype, rows, width: (streaming.cast(dtype, "fp32", rows * width),), LOW),
    _one("cast_from_fp32", lambda dtype, rows, width: (streaming.cast("fp32", dtype, rows * width),), LOW),
    _one("flatten", lambda dtype, rows, width: (streaming.copy(dtype, rows * width),)),
    _one("unflatten", lambda dtype, rows, width: (streaming.copy(dtype, rows * width),)),
    _one("add", _in_graph(_add, backward=False)),
    _one("accumulate_grad", _accumulate),
    *_both("gelu", lambda g, width: g.activate(g.activation(width), width)),
    *_both("gelu_tanh", lambda g, width: g.activate(g.activation(width), width)),
    *_both("squared_relu", lambda g, width: g.activate(g.activation(width), width)),
    *_both("swiglu", _gated),
    *_both("geglu", _gated),
    *_both("rms_norm", _norm(rms=True)),
    *_both("layer_norm", _norm(rms=False)),
    *_both("add_rms_norm", _norm(rms=True, residual=True)),
    *_both("add_layer_norm", _norm(rms=False, residual=True)),
    *_both("rotary", lambda g, width: g.rotary(g.activation(width), width)),
    *_both("cross_entropy", lambda g, width: g.cross_entropy(g.activation(width), width), max_width=32768, aspect=8),
    *_both("embedding", lambda g, width: g.embedding(g.rows, width, embedding_table_rows(g.rows))),
    _one("dropout_add", lambda dtype, rows, width: (streaming.dropout_add(dtype, rows * width),)),
    _one("dropout_add", lambda d, rows, width: (streaming.dropout_add_backward(d, rows * width),), backward=True),
    _one("adamw", lambda dtype, rows, width: (streaming.fused_step("adamw", rows * width),), ("fp32",)),
    _one(
        "optimizer_step",
        lambda dtype, rows, width: (*streaming.around_step(dtype, n := rows * width), streaming.fused_step("adamw", n)),
    ),
    _one("grad_norm", lambda dtype, rows, width: (streaming.grad_norm(dtype, rows * width),)),
)  # fmt: skip
"""``adamw`` is the fused fp32 step alone; ``optimizer_step`` has the gradient of the given dtype widened, scaled (by
clipping and unscaling) and the new parameters written back, as an engine's step does."""

NAMES = tuple(dict.fromkeys(entry.name for entry in KERNELS))
assert all(dtype in DTYPE_BYTES for entry in KERNELS for dtype in entry.dtypes)
