"""Operands of the kernels in ``table``, and the call of one implementation on them.

Shapes: R rows, W width of the main operand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.operator import Op
from runtime.kernels.blockwise8 import Blockwise8, zeros8
from runtime.kernels.quantize import quantize_reference
from validator.kernels.functions import ACTIVATIONS, GATES, RULES, Flat, Function, function
from validator.kernels.implementation import USES_UP, missing
from validator.kernels.table import HEAD_DIM, QUANTIZED, SMALL_TENSORS, Kernel, embedding_table_rows, vocabulary
from validator.timing import TORCH_DTYPES, filled


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A call with its operands, and what one call costs."""

    call: Callable[[], Any]
    shape: tuple[int, ...]
    """Of the main operand."""
    ops: tuple[Op, ...]
    """The estimator's operators for it."""
    least_bytes: int
    """Every operand read once and every result written once: no implementation moves less."""
    operand_bytes: int = 0
    """Of everything that is there before the call and that it reads."""
    before: Callable[[], Any] | None = None
    """Runs ahead of every call and is not part of it: makes again what a call uses up."""

    @property
    def n_bytes(self) -> int:
        """Bytes read plus written by the estimator's count."""
        return sum(op.n_bytes for op in self.ops)

    @property
    def flops(self) -> int:
        return round(sum(op.flops for op in self.ops))


class Bound(NamedTuple):
    """The forward call; which operands it reads; for backward: leaves that get a gradient, what backward reads besides
    the gradient of the result."""

    forward: Callable[[], Any]
    reads: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...] = ()
    saved: tuple[Tensor, ...] = ()
    writes: tuple[Tensor, ...] | None = None
    """Where that is not the result: operators in place."""


class Make:
    """Makes operands of one dtype on one device, and knows the function of one implementation."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: str, implementation: str = "torch") -> None:
        self.rows, self.width = shape
        self.implementation = implementation
        self.dtype, self.device = TORCH_DTYPES[dtype], device

    def function(self, kernel: str) -> Function:
        """Of the wanted implementation."""
        return function(kernel, self.implementation)

    def main(self) -> Tensor:
        """``[R, W]``"""
        return filled((self.rows, self.width), self.device, self.dtype)

    def flat32(self) -> Tensor:
        """``[R * W]`` in fp32"""
        return filled((self.rows * self.width,), self.device, torch.float32)

    def leaf(self) -> Tensor:
        return self.main().requires_grad_()

    def weight(self) -> Tensor:
        """``[W]``"""
        return torch.ones(self.width, device=self.device, dtype=self.dtype, requires_grad=True)

    def indices(self, below: int) -> Tensor:
        """``[R]`` int64"""
        return torch.randint(0, below, (self.rows,), device=self.device)


def prepare(kernel: Kernel, shape: tuple[int, ...], dtype: str, device: str, implementation: str) -> Prepared:
    """See ``Kernel.prepare``."""
    reason = missing(kernel.name, implementation, device)
    if reason:
        raise InputError(reason)
    make = Make(shape, dtype, device, implementation)
    return prepared(kernel, bound(kernel.name, make), make, kernel.ops(shape, dtype, implementation))


def bound(kernel: str, make: Make) -> Bound:
    """Operands of the table's ``kernel`` and its forward call."""
    return _BUILDERS[kernel](make)


def prepared(kernel: Kernel, bound: Bound, make: Make, ops: tuple[Op, ...]) -> Prepared:
    """One direction of ``bound``, or both."""
    shape, operand_bytes = (make.rows, make.width), _size(bound.reads)
    outputs = _tensors(bound.forward())
    first_bytes = operand_bytes + _size(outputs if bound.writes is None else bound.writes)
    if not (kernel.backward or kernel.both):
        return Prepared(call=bound.forward, shape=shape, ops=ops, least_bytes=first_bytes, operand_bytes=operand_bytes)
    incoming = tuple(torch.full_like(out, 0.01) if out.ndim else torch.ones_like(out) for out in outputs)
    second_bytes = _size(bound.saved) + _size(incoming) + _size(bound.leaves)
    call, before = _backward(kernel, bound, make.implementation, incoming)
    return Prepared(
        call=call, shape=shape, ops=ops, least_bytes=second_bytes + (first_bytes if kernel.both else 0),
        operand_bytes=operand_bytes, before=before,
    )  # fmt: skip


def _backward(
    kernel: Kernel, bound: Bound, implementation: str, incoming: tuple[Tensor, ...]
) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """The call, and what runs ahead of each.

    A backward pass that can run again is repeated on the same graph; where it uses its graph up (``compile``, ``liger`` and
    ``USES_UP``), a forward pass that is not timed goes ahead of each. What is overwritten on the way is put back.
    """
    uses_up = implementation in ("compile", "liger") or (kernel.name, implementation) in USES_UP
    overwrites = implementation == "liger" or (implementation == "cuda" and uses_up)
    put_back = _putting_back((*bound.reads, *incoming)) if overwrites else None
    if kernel.both:
        return lambda: torch.autograd.grad(_tensors(bound.forward()), bound.leaves, incoming), put_back
    if not uses_up:
        outputs = _tensors(bound.forward())
        return lambda: torch.autograd.grad(outputs, bound.leaves, incoming, retain_graph=True), None
    graph: list[tuple[Tensor, ...]] = []

    def before() -> None:
        graph.clear()
        if put_back is not None:
            put_back()
        graph.append(_tensors(bound.forward()))

    return lambda: torch.autograd.grad(graph[0], bound.leaves, incoming), before


def _putting_back(tensors: tuple[Tensor, ...]) -> Callable[[], None]:
    """Restores the present values of ``tensors``."""
    copies = [(t.detach(), t.detach().clone()) for t in tensors]

    def put_back() -> None:
        for tensor, copy in copies:
            tensor.copy_(copy)

    return put_back


def _tensors(result: Any) -> tuple[Tensor, ...]:
    if result is None:
        return ()
    return tuple(t for t in result if isinstance(t, Tensor)) if isinstance(result, tuple | list) else (result,)


def _size(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def _copy(m: Make) -> Bound:
    source, target = m.main(), m.main()
    return Bound(lambda: target.copy_(source), (source,))


def _cast_to_fp32(m: Make) -> Bound:
    source, target = m.main(), m.main().float()
    return Bound(lambda: target.copy_(source), (source,))


def _cast_from_fp32(m: Make) -> Bound:
    source, target = m.main().float(), m.main()
    return Bound(lambda: target.copy_(source), (source,))


def _bucket(name: str) -> Callable[[Make], Bound]:
    """A bucket, its slices, and small tensors of their sizes."""

    def bind(m: Make) -> Bound:
        bucket = m.main().flatten()
        slices = list(bucket.tensor_split(min(m.rows, SMALL_TENSORS)))
        small, move = [piece.clone() for piece in slices], m.function(name)
        one, many = (bucket,), tuple(small)
        reads, writes = (many, one) if name == "flatten" else (one, many)
        return Bound(lambda: move(small, slices, bucket), reads, writes=writes)

    return bind


def _add(m: Make) -> Bound:
    a, b = m.main(), m.main()
    return Bound(lambda: a + b, (a, b))


def _accumulate_grad(m: Make) -> Bound:
    bucket, grad = m.main(), m.main().mul_(1e-6)
    return Bound(lambda: bucket.add_(grad), (bucket, grad))


def _activation(name: str) -> Callable[[Make], Bound]:
    def bind(m: Make) -> Bound:
        x, activate = m.leaf(), m.function(name)
        return Bound(lambda: activate(x), (x,), (x,), (x,))

    return bind


def _gated(name: str) -> Callable[[Make], Bound]:
    def bind(m: Make) -> Bound:
        gate, up, activate = m.leaf(), m.leaf(), m.function(name)
        return Bound(lambda: activate(gate, up), (gate, up), (gate, up), (gate, up))

    return bind


def _norm(name: str) -> Callable[[Make], Bound]:
    def bind(m: Make) -> Bound:
        x, norm = m.leaf(), m.function(name)
        params = (m.weight(),) if name == "rms_norm" else (m.weight(), m.weight())
        return Bound(lambda: norm(x, *params), (x, *params), (x, *params), (x, params[0]))

    return bind


def _add_norm(name: str) -> Callable[[Make], Bound]:
    """The norm of the residual stream with ``x`` added to it, and that sum: both are results."""

    def bind(m: Make) -> Bound:
        residual, x, add_norm = m.leaf(), m.main(), m.function(name)
        params = (m.weight(),) if name == "add_rms_norm" else (m.weight(), m.weight())
        forward = lambda: add_norm(x, residual, *params)  # noqa: E731
        return Bound(forward, (residual, x, *params), (residual, *params), (residual, params[0]))

    return bind


def _rotary(m: Make) -> Bound:
    x = m.main().view(1, m.rows, -1, HEAD_DIM).requires_grad_()
    angles = torch.full((m.rows, HEAD_DIM // 2), 0.5, device=m.device)
    cos, sin = angles.cos().to(m.dtype), angles.sin().to(m.dtype)
    rotate = m.function("rotary")
    return Bound(lambda: rotate(x, cos, sin), (x, cos, sin), (x,), (cos, sin))


def _cross_entropy(m: Make) -> Bound:
    logits, labels, loss = m.leaf(), m.indices(m.width), m.function("cross_entropy")
    return Bound(lambda: loss(logits, labels), (logits, labels), (logits,), (logits, labels))


def _linear_cross_entropy(m: Make) -> Bound:
    h, labels = m.leaf(), m.indices(vocabulary(m.width))
    weight = filled((vocabulary(m.width), m.width), m.device, m.dtype).mul_(m.width**-0.5).requires_grad_()
    loss = m.function("linear_cross_entropy")
    return Bound(lambda: loss(h, weight, labels), (h, weight, labels), (h, weight), (h, weight, labels))


def _embedding(m: Make) -> Bound:
    table = filled((embedding_table_rows(m.rows), m.width), m.device, m.dtype).requires_grad_()
    ids = m.indices(len(table))
    looked_up = torch.empty(m.rows, m.width, dtype=m.dtype, device="meta")
    return Bound(lambda: F.embedding(ids, table), (ids, looked_up), (table,), (ids,))


def _dropout_add(m: Make) -> Bound:
    x, residual, add = m.leaf(), m.main(), m.function("dropout_add")
    return Bound(lambda: add(x, residual), (x, residual), (x,))


def _step(name: str) -> Callable[[Make], Bound]:
    """``adamw`` is the fp32 step alone; the others take gradients of the main dtype times a factor and write parameters in
    that dtype too."""

    def bind(m: Make) -> Bound:
        alone, rule, eight_bit = name == "adamw", RULES[name], name == "adamw8"
        master, grads = m.flat32(), m.main().flatten()
        target = m.main().flatten() if m.dtype != torch.float32 else None
        states: list[Any] = [zeros8(master) if eight_bit else m.flat32() for _ in range(rule.n_states)]
        if not eight_bit:
            states[-1].square_()  # a second moment, or a sum of squares
        one = torch.ones(1, device=m.device)
        flat = Flat(rule, master, grads, states, target, one.clone(), None if alone else one)
        held = [t for s in states for t in (s if isinstance(s, Blockwise8) else (s,))]
        written = (master, *held) if target is None else (master, *held, target)
        return Bound(m.function(name)(flat), (grads, master, *held), writes=written)

    return bind


def _grad_norm(m: Make) -> Bound:
    grads, norm = m.main().flatten(), m.function("grad_norm")
    return Bound(lambda: norm([grads]), (grads,))


def _quantize(m: Make) -> Bound:
    x, quantize = m.main().flatten(), m.function("quantize_int8")
    return Bound(lambda: quantize(x), (x,))


def _dequantize(m: Make) -> Bound:
    stored, dequantize = quantize_reference(m.main().flatten(), *QUANTIZED), m.function("dequantize_int8")
    return Bound(lambda: dequantize(stored, m.dtype), (stored.codes, stored.scales))


_BUILDERS: dict[str, Callable[[Make], Bound]] = {
    "copy": _copy,
    "cast_to_fp32": _cast_to_fp32,
    "cast_from_fp32": _cast_from_fp32,
    "flatten": _bucket("flatten"),
    "unflatten": _bucket("unflatten"),
    "add": _add,
    "accumulate_grad": _accumulate_grad,
    **{name: _activation(name) for name in ACTIVATIONS},
    **{name: _gated(name) for name in GATES},
    "rms_norm": _norm("rms_norm"),
    "layer_norm": _norm("layer_norm"),
    "add_rms_norm": _add_norm("add_rms_norm"),
    "add_layer_norm": _add_norm("add_layer_norm"),
    "rotary": _rotary,
    "cross_entropy": _cross_entropy,
    "linear_cross_entropy": _linear_cross_entropy,
    "embedding": _embedding,
    "dropout_add": _dropout_add,
    **{name: _step(name) for name in RULES},
    "grad_norm": _grad_norm,
    "quantize_int8": _quantize,
    "dequantize_int8": _dequantize,
}
