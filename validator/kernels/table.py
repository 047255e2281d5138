"""Every memory-bound operator of a training step: what the estimator counts for it, and how to call it.

Counts come from the estimator's operators (``estimator.ops``), calls from the runtime (``validator.kernels.calls``).
This module needs no torch; ``Kernel.prepare`` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from estimator.errors import InputError, require_choice, require_int, unknown_choice
from estimator.job.kernels import KERNELS as RUNTIME_KERNELS
from estimator.ops import streaming
from estimator.ops.graph import Graph
from estimator.ops.kernels import bucket, dropout, grad_norm, optimizer, quantize
from estimator.ops.operator import Op
from estimator.units import DTYPE_BYTES

if TYPE_CHECKING:
    from validator.kernels.calls import Prepared

ALL = ("bf16", "fp16", "fp32")
LOW = ("bf16", "fp16")
HEAD_DIM = 64
"""Channels of a head that is rotated here."""
SMALL_TENSORS = 256
"""Most tensors that ``flatten`` and ``unflatten`` copy."""
QUANTIZED = ("int8", 256)
"""Format and block of ``quantize_int8`` and ``dequantize_int8``."""
_MIN_WIDTH = 64
_SAMPLE = (1 << 10, 1 << 10)
"""Of a main operand, to learn how many bytes an element stands for."""
_OURS = frozenset(RUNTIME_KERNELS)

Count = Callable[[str, int, int], tuple[Op, ...]]
"""From dtype, rows and width of the main operand to the operators that the estimator has for it."""


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One operator in one direction, or in both one after the other."""

    name: str
    backward: bool = False
    both: bool = False
    dtypes: tuple[str, ...]
    """Of the main operand."""
    plain: Count
    """Of the body in plain torch; where torch has no such operator, of the runtime's kernel."""
    ours: Count
    """Of the runtime's kernel; where there is none, as ``plain``."""
    max_width: int = 4096
    aspect: int = 1
    """About how many times wider than high the main operand is, until ``max_width``."""
    has_weight: bool = False
    """Whether an operand beside the main one is too large to be left out when sizes are chosen."""

    def ops(self, shape: tuple[int, ...], dtype: str, implementation: str = "torch") -> tuple[Op, ...]:
        """The estimator's operators for a main operand of ``shape`` ``(rows, width)``, in order: those of the runtime's kernel
        for ``implementation`` ``cuda``, those of plain torch for all others."""
        rows, width = shape
        count = self.ours if implementation == "cuda" else self.plain
        return count(require_choice("dtype", dtype, self.dtypes), rows, width)

    def n_bytes(self, shape: tuple[int, ...], dtype: str, implementation: str = "torch") -> int:
        """Bytes read plus written by the estimator's count."""
        return sum(op.n_bytes for op in self.ops(shape, dtype, implementation))

    def shape_for(self, n_bytes: int, dtype: str) -> tuple[int, int]:
        """The shape of the main operand with which one call moves about ``n_bytes`` by the count of the plain body, so that
        all implementations get the same one."""
        require_int("n_bytes", n_bytes)
        numel = max(1, round(n_bytes * math.prod(_SAMPLE) / self.n_bytes(_SAMPLE, dtype)))
        side = 2 ** int(math.log2(numel) / 2)
        width = max(_MIN_WIDTH, min(self.max_width, self.aspect * side))
        if not self.has_weight:
            return max(1, round(numel / width)), width
        once, twice = (self.n_bytes((rows, width), dtype) for rows in (1 << 10, 2 << 10))
        fixed = 2 * once - twice
        return max(1, round((n_bytes - fixed) * (1 << 10) / (twice - once))), width

    def size_of(self, shape: tuple[int, ...], dtype: str) -> int:
        """Bytes for which ``shape_for`` gives ``shape``, if there are any."""
        if self.has_weight:
            return self.n_bytes(shape, dtype)
        rows, width = shape
        each = self.n_bytes(_SAMPLE, dtype) / math.prod(_SAMPLE)
        size = round(rows * width * each)
        # Rows may have been rounded up to where a wider shape begins.
        return size if self.shape_for(size, dtype) == (rows, width) else round((rows - 0.25) * width * each)

    def prepare(self, size: int | tuple[int, ...], dtype: str, device: str, implementation: str = "torch") -> Prepared:
        """Operands on ``device`` (a torch device) and the call. ``size``: bytes to move, or the main operand's shape.

        Raises ``InputError`` for a dtype that the kernel has not, or an implementation that is not there.
        """
        from validator.kernels.calls import prepare

        return prepare(
            self, self.shape_for(size, dtype) if isinstance(size, int) else size, dtype, device, implementation
        )


def kernel(name: str, backward: bool = False, both: bool = False) -> Kernel:
    """The entry of that name and direction; ``both``: the forward and then the backward pass. Raises ``InputError``."""
    found = {(entry.backward, entry.both): entry for entry in KERNELS if entry.name == name}
    if not found:
        raise unknown_choice("kernel", name, {entry.name for entry in KERNELS})
    if both and backward:
        raise InputError(f"kernel {name!r} is asked for with backward and both; allowed: one of them")
    if (backward, both) in found:
        return found[backward, both]
    if (False, True) in found:
        raise InputError(f"kernel {name!r} is one of forward and backward together; allowed: both")
    if (True, False) not in found or (False, False) not in found:
        raise InputError(f"kernel {name!r} has no {'backward' if backward or both else 'forward'} pass of its own")
    return _joined(found[False, False], found[True, False])


def _joined(first: Kernel, second: Kernel) -> Kernel:
    def in_turn(a: Count, b: Count) -> Count:
        return lambda dtype, rows, width: (*a(dtype, rows, width), *b(dtype, rows, width))

    return replace(first, both=True, plain=in_turn(first.plain, second.plain), ours=in_turn(first.ours, second.ours))


def _in_graph(build: Callable[[Graph, int], object], backward: bool, kernels: frozenset[str]) -> Count:
    """Counts what ``build`` writes into a unit's graph. A weight's gradient is not yet added to its bucket."""

    def count(dtype: str, rows: int, width: int) -> tuple[Op, ...]:
        graph = Graph(dtype, rows, kernels)
        build(graph, width)
        nodes = reversed(graph.nodes) if backward else graph.nodes
        ops = [op for node in nodes for op in (node.backward if backward else node.forward)]
        return tuple(op for op in ops if op.name != "accumulate_grad")

    return count


def _both(
    name: str, build: Callable[[Graph, int], object], max_width: int = 4096, aspect: int = 1, has_weight: bool = False
) -> list[Kernel]:
    return [
        Kernel(
            name=name, backward=backward, dtypes=ALL, plain=_in_graph(build, backward, frozenset()),
            ours=_in_graph(build, backward, _OURS), max_width=max_width, aspect=aspect,
            has_weight=has_weight,
        )
        for backward in (False, True)
    ]  # fmt: skip


def _one(
    name: str, plain: Count, ours: Count | None = None, dtypes: tuple[str, ...] = ALL, backward: bool = False
) -> Kernel:
    return Kernel(name=name, backward=backward, dtypes=dtypes, plain=plain, ours=ours or plain)


def _add(g: Graph, width: int) -> None:
    g.add(g.activation(width), g.activation(width), width)


def _activation(name: str) -> Callable[[Graph, int], object]:
    return lambda g, width: g.activate(g.activation(width), width, name)


def _gated(name: str) -> Callable[[Graph, int], object]:
    return lambda g, width: g.gated_activate(g.activation(width), g.activation(width), width, name)


def _norm(rms: bool) -> Callable[[Graph, int], object]:
    return lambda g, width: g.norm(g.activation(width), width, rms=rms, bias=not rms)


def _add_norm(rms: bool) -> Callable[[Graph, int], object]:
    return lambda g, width: g.add_norm(g.activation(width), g.activation(width), width, rms=rms, bias=not rms)


def _rotary(g: Graph, width: int) -> None:
    g.rotary(g.activation(width), (1, g.rows, width // HEAD_DIM, HEAD_DIM), HEAD_DIM)


def _head(g: Graph, width: int) -> None:
    g.linear_cross_entropy(g.activation(width), width, vocabulary(width), bias=False, pending=False)


def _accumulate(dtype: str, rows: int, width: int) -> tuple[Op, ...]:
    graph = Graph(dtype, 0)
    graph.embedding(0, width, rows)
    return tuple(op for op in graph.nodes[0].backward if op.name == "accumulate_grad")


def _bucket(dtype: str, rows: int, width: int) -> tuple[Op, ...]:
    element = (dtype, DTYPE_BYTES[dtype])
    return (bucket.cost(rows * width, element, element, scaled=False),)


def _dropout(backward: bool) -> Kernel:
    plain = streaming.dropout_add_backward if backward else streaming.dropout_add
    return _one(
        "dropout_add", lambda dtype, rows, width: (plain(dtype, rows * width),),
        lambda dtype, rows, width: (dropout.cost(rows * width, dtype, DTYPE_BYTES[dtype])[backward],), backward=backward,
    )  # fmt: skip


def _step(rule: str, *, eight_bit: bool = False) -> Count:
    """The kernel's step on fp32 parameters with gradients of ``dtype``, and parameters in that dtype written too."""

    def count(dtype: str, rows: int, width: int) -> tuple[Op, ...]:
        grad = DTYPE_BYTES[dtype]
        copy = 0 if dtype == "fp32" else grad
        return (optimizer.cost(rule, rows * width, grad, copy, eight_bit=eight_bit)._replace(dtype=dtype),)

    return count


def _plain_step(rule: str) -> Count:
    """torch's fused fp32 step, and the passes that an engine makes around it."""

    def count(dtype: str, rows: int, width: int) -> tuple[Op, ...]:
        return (*streaming.around_step(dtype, rows * width), streaming.fused_step(rule, rows * width))  # type: ignore[arg-type]

    return count


def _quantized(which: int) -> Count:
    def count(dtype: str, rows: int, width: int) -> tuple[Op, ...]:
        return (quantize.cost(rows * width, *QUANTIZED, dtype, DTYPE_BYTES[dtype])[which],)

    return count


def embedding_table_rows(rows: int) -> int:
    """Rows of the table in which ``rows`` are looked up here: every row about four times."""
    return max(1, rows // 4)


def vocabulary(width: int) -> int:
    """Tokens for hidden states of ``width``: Llama 3 has 31.3 x 4,096."""
    return 32 * width


KERNELS: tuple[Kernel, ...] = (
    _one("copy", lambda dtype, rows, width: (streaming.copy(dtype, rows * width),)),
    _one("cast_to_fp32", lambda dtype, rows, width: (streaming.cast(dtype, "fp32", rows * width),), dtypes=LOW),
    _one("cast_from_fp32", lambda dtype, rows, width: (streaming.cast("fp32", dtype, rows * width),), dtypes=LOW),
    _one("flatten", lambda dtype, rows, width: (streaming.copy(dtype, rows * width),), _bucket),
    _one("unflatten", lambda dtype, rows, width: (streaming.copy(dtype, rows * width),), _bucket),
    _one("add", _in_graph(_add, False, frozenset())),
    _one("accumulate_grad", _accumulate),
    *_both("gelu", _activation("gelu")),
    *_both("gelu_tanh", _activation("gelu_tanh")),
    *_both("squared_relu", _activation("relu_squared")),
    *_both("swiglu", _gated("silu")),
    *_both("geglu", _gated("gelu")),
    *_both("rms_norm", _norm(rms=True)),
    *_both("layer_norm", _norm(rms=False)),
    *_both("add_rms_norm", _add_norm(rms=True)),
    *_both("add_layer_norm", _add_norm(rms=False)),
    *_both("rotary", _rotary),
    *_both("cross_entropy", lambda g, width: g.cross_entropy(g.activation(width), width), max_width=32768, aspect=8),
    _joined(*_both("linear_cross_entropy", _head, aspect=2, has_weight=True)),
    *_both("embedding", lambda g, width: g.embedding(g.rows, width, embedding_table_rows(g.rows))),
    _dropout(backward=False),
    _dropout(backward=True),
    _one("adamw", lambda dtype, rows, width: (streaming.fused_step("adamw", rows * width),), _step("adamw"), ("fp32",)),
    _one("optimizer_step", _plain_step("adamw"), _step("adamw")),
    _one("sgd", _plain_step("sgd"), _step("sgd")),
    _one("lion", _step("lion")),
    _one("adagrad", _step("adagrad")),
    _one("lamb", _step("lamb")),
    _one("adamw8", _step("adamw", eight_bit=True)),
    _one(
        "grad_norm", lambda dtype, rows, width: (streaming.grad_norm(dtype, rows * width),),
        lambda dtype, rows, width: (grad_norm.cost(rows * width, dtype, DTYPE_BYTES[dtype]),),
    ),
    _one("quantize_int8", _quantized(0)),
    _one("dequantize_int8", _quantized(1)),
)  # fmt: skip
"""``adamw`` is the fp32 step alone; ``optimizer_step`` is AdamW with the gradient of the given dtype widened and scaled (by
clipping and unscaling) and the new parameters written back, as an engine's step does; so are the other optimizers. Of
``linear_cross_entropy`` some implementations compute the gradients in the forward pass: there is only both together."""

NAMES = tuple(dict.fromkeys(entry.name for entry in KERNELS))
assert all(dtype in DTYPE_BYTES for entry in KERNELS for dtype in entry.dtypes)
