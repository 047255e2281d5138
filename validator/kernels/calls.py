"""Operands and calls of the kernels in ``table``: the functions that the runtime itself uses.

Shapes: R rows, W width of the main operand. What the runtime has no function for is plain torch. ``cuda`` calls
``runtime.kernels`` itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.operator import Op
from estimator.schedule.buffers import UPDATE_CHUNK_NUMEL
from runtime import functional
from runtime.optimizer import OptimizerConfig, Shard, step_shard, update
from validator.kernels.implementation import missing
from validator.kernels.table import SMALL_TENSORS, Kernel, embedding_table_rows
from validator.timing import TORCH_DTYPES, filled

_EPS = 1e-5
_HEAD_DIM = 64
_OPTIMIZER = OptimizerConfig()


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

    @property
    def n_bytes(self) -> int:
        """Bytes read plus written by the estimator's count."""
        return sum(op.n_bytes for op in self.ops)

    @property
    def flops(self) -> int:
        return round(sum(op.flops for op in self.ops))


class _Bound(NamedTuple):
    """The forward call; which operands it reads; for backward: leaves that get a gradient, what backward reads besides
    the gradient of the result."""

    forward: Callable[[], Any]
    reads: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...] = ()
    saved: tuple[Tensor, ...] = ()
    n_written_bytes: int | None = None
    """Where it is not the size of the result: operators in place."""


class _Make:
    """Makes operands of one dtype on one device; ``ours`` says whose function is wanted."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: str, implementation: str = "torch") -> None:
        self.rows, self.width = shape
        self.ours = implementation == "cuda"
        self.dtype, self.device = TORCH_DTYPES[dtype], device

    def pick(self, module: str, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        """``runtime.kernels.<module>.<name>`` where our own implementation is wanted, else ``plain``."""
        return getattr(importlib.import_module(f"runtime.kernels.{module}"), name) if self.ours else plain

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
    ops = kernel.ops(shape, dtype)
    bound = _BUILDERS[kernel.name](_Make(shape, dtype, device, implementation))
    if not kernel.backward:
        result = bound.forward()
        written = bound.n_written_bytes
        written = _size(_tensors(result)) if written is None else written
        return Prepared(call=bound.forward, shape=shape, ops=ops, least_bytes=_size(bound.reads) + written)
    outputs = _tensors(bound.forward())
    incoming = tuple(torch.full_like(out, 0.01) for out in outputs)
    least_bytes = _size(bound.saved) + _size(incoming) + _size(bound.leaves)
    return Prepared(
        call=lambda: torch.autograd.grad(outputs, bound.leaves, incoming, retain_graph=True),
        shape=shape, ops=ops, least_bytes=least_bytes,
    )  # fmt: skip


def _tensors(result: Any) -> tuple[Tensor, ...]:
    if result is None:
        return ()
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def _size(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def _copy(m: _Make) -> _Bound:
    source, target = m.main(), m.main()
    return _Bound(lambda: target.copy_(source), (source,))


def _cast_to_fp32(m: _Make) -> _Bound:
    source, target = m.main(), m.main().float()
    return _Bound(lambda: target.copy_(source), (source,))


def _cast_from_fp32(m: _Make) -> _Bound:
    source, target = m.main().float(), m.main()
    return _Bound(lambda: target.copy_(source), (source,))


def _pieces(m: _Make) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A bucket, its slices, and small tensors of their sizes."""
    bucket = m.main().flatten()
    slices = list(bucket.tensor_split(min(m.rows, SMALL_TENSORS)))
    return bucket, slices, [piece.clone() for piece in slices]


def _flatten(m: _Make) -> _Bound:
    bucket, slices, small = _pieces(m)
    flatten = m.pick("bucket", "flatten", lambda small, _: torch._foreach_copy_(slices, small))
    return _Bound(lambda: flatten(small, bucket), (bucket,), n_written_bytes=_size((bucket,)))


def _unflatten(m: _Make) -> _Bound:
    bucket, slices, small = _pieces(m)
    unflatten = m.pick("bucket", "unflatten", lambda _, small: torch._foreach_copy_(small, slices))
    return _Bound(lambda: unflatten(bucket, small), (bucket,), n_written_bytes=_size((bucket,)))


def _add(m: _Make) -> _Bound:
    a, b = m.main(), m.main()
    return _Bound(lambda: a + b, (a, b))


def _accumulate_grad(m: _Make) -> _Bound:
    bucket, grad = m.main(), m.main().mul_(1e-6)
    return _Bound(lambda: bucket.add_(grad), (bucket, grad))


def _activation(name: str) -> Callable[[_Make], _Bound]:
    def bind(m: _Make) -> _Bound:
        plain = functional.activate if name != "relu_squared" else lambda x, _: F.relu(x).square()
        x, activate = m.leaf(), m.pick("activation", "activate", plain)
        return _Bound(lambda: activate(x, name), (x,), (x,), (x,))

    return bind


def _gated(name: str) -> Callable[[_Make], _Bound]:
    def bind(m: _Make) -> _Bound:
        gate, up, activate = m.leaf(), m.leaf(), m.pick("activation", "gated_activate", functional.gated_activate)
        return _Bound(lambda: activate(gate, up, name), (gate, up), (gate, up), (gate, up))

    return bind


def _rms_norm(m: _Make) -> _Bound:
    x, weight, norm = m.leaf(), m.weight(), m.pick("norm", "rms_norm", functional.rms_norm)
    return _Bound(lambda: norm(x, weight, _EPS), (x, weight), (x, weight), (x, weight))


def _layer_norm(m: _Make) -> _Bound:
    x, weight, bias, norm = m.leaf(), m.weight(), m.weight(), m.pick("norm", "layer_norm", _torch_layer_norm)
    forward = lambda: norm(x, weight, bias, _EPS)  # noqa: E731
    return _Bound(forward, (x, weight, bias), (x, weight, bias), (x, weight))


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _add_norm(name: str, *bias: None) -> Callable[[_Make], _Bound]:
    """The norm of the residual stream with ``x`` added to it, and that sum: both are results."""

    def bind(m: _Make) -> _Bound:
        residual, weight, x = m.leaf(), m.weight(), m.main()
        plain: Any = functional.rms_norm if name == "add_rms_norm" else _torch_layer_norm

        def both(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            h = residual + x
            return plain(h, *rest), h

        add_norm = m.pick("norm", name, both)
        forward = lambda: add_norm(x, residual, weight, *bias, _EPS)  # noqa: E731
        return _Bound(forward, (residual, x, weight), (residual, weight), (residual, weight))

    return bind


def _rotary(m: _Make) -> _Bound:
    x = m.main().view(1, m.rows, -1, _HEAD_DIM).requires_grad_()
    angles = torch.full((m.rows, _HEAD_DIM // 2), 0.5, device=m.device)
    cos, sin = angles.cos().to(m.dtype), angles.sin().to(m.dtype)
    rotate = m.pick("rotary", "rotate", functional.rotate)
    return _Bound(lambda: rotate(x, cos, sin), (x, cos, sin), (x,), (cos, sin))


def _cross_entropy(m: _Make) -> _Bound:
    logits, labels = m.leaf(), m.indices(m.width)
    return _Bound(lambda: F.cross_entropy(logits.float(), labels), (logits, labels), (logits,), (logits, labels))


def _embedding(m: _Make) -> _Bound:
    table = filled((embedding_table_rows(m.rows), m.width), m.device, m.dtype).requires_grad_()
    ids = m.indices(len(table))
    looked_up = torch.empty(m.rows, m.width, dtype=m.dtype, device="meta")
    return _Bound(lambda: F.embedding(ids, table), (ids, looked_up), (table,), (ids,))


def _dropout_add(m: _Make) -> _Bound:
    x, residual = m.leaf(), m.main()
    add = m.pick("dropout", "dropout_residual", lambda x, residual, p: residual + F.dropout(x, p))
    return _Bound(lambda: add(x, residual, 0.1), (x, residual), (x,))


def _adamw(m: _Make) -> _Bound:
    param, grad, first, second = (m.flat32() for _ in range(4))
    second.square_()
    step = torch.ones((), device=m.device)
    operands, written = (param, grad, first, second), 12 * param.numel()
    if m.ours:
        return _Bound(_own_step(param, grad, [first, second], step), operands, n_written_bytes=written)

    def forward() -> None:
        update("adamw", _OPTIMIZER, _OPTIMIZER.lr, step, param, grad, [first, second])

    return _Bound(forward, operands, n_written_bytes=written)


def _own_step(
    param: Tensor, grad: Tensor, states: list[Tensor], step: Tensor, factor: Tensor | None = None,
    copies: list[Tensor] | None = None,
) -> Callable[[], None]:  # fmt: skip
    """AdamW of ``runtime.kernels``, which does the passes around the step as well."""
    from runtime.kernels.optimizer import optimizer_step
    from runtime.kernels.rules import Adam, Control

    rule, control = Adam(), Control(lr=_OPTIMIZER.lr, step=step, factor=factor)
    return lambda: optimizer_step(rule, [param], [grad], [[state] for state in states], control, copies)


def _optimizer_step(m: _Make) -> _Bound:
    """As ``runtime.executor`` steps a group."""
    grads, target = m.main().flatten(), m.main().flatten()
    master, first, second = (m.flat32() for _ in range(3))
    second.square_()
    step, factor = torch.ones((), device=m.device), torch.ones((), device=m.device)
    low = m.dtype != torch.float32
    temp = torch.empty(min(master.numel(), UPDATE_CHUNK_NUMEL), device=m.device) if low else None

    shard = Shard(master=master, grads=grads, states=[first, second], target=target if low else None, temp=temp)

    def forward() -> None:
        step_shard("adamw", _OPTIMIZER, _OPTIMIZER.lr, step, factor, shard)

    written = 12 * master.numel() + (_size((target,)) if low else 0)
    if m.ours:
        forward = _own_step(master, grads, [first, second], step, factor, [target] if low else None)
    return _Bound(forward, (grads, master, first, second), n_written_bytes=written)


def _grad_norm(m: _Make) -> _Bound:
    grads = m.main().flatten()
    norm = m.pick("grad_norm", "squares", lambda tensors: torch.linalg.vector_norm(tensors[0], dtype=torch.float32))
    return _Bound(lambda: norm([grads]), (grads,))


_BUILDERS: dict[str, Callable[[_Make], _Bound]] = {
    "copy": _copy,
    "cast_to_fp32": _cast_to_fp32,
    "cast_from_fp32": _cast_from_fp32,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "add": _add,
    "accumulate_grad": _accumulate_grad,
    "gelu": _activation("gelu"),
    "gelu_tanh": _activation("gelu_tanh"),
    "squared_relu": _activation("relu_squared"),
    "swiglu": _gated("silu"),
    "geglu": _gated("gelu"),
    "rms_norm": _rms_norm,
    "layer_norm": _layer_norm,
    "add_rms_norm": _add_norm("add_rms_norm"),
    "add_layer_norm": _add_norm("add_layer_norm", None),
    "rotary": _rotary,
    "cross_entropy": _cross_entropy,
    "embedding": _embedding,
    "dropout_add": _dropout_add,
    "adamw": _adamw,
    "optimizer_step": _optimizer_step,
    "grad_norm": _grad_norm,
}
