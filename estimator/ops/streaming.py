"""Operators outside a unit's passes: what an optimizer step, a copy and the like move. All are bound by memory."""

from __future__ import annotations

from estimator.job.optimizers import FOREACH, OPTIMIZERS, Optimizer
from estimator.ops.operator import Op
from estimator.units import DTYPE_BYTES


def copy(dtype: str, numel: int) -> Op:
    """One read and one write of ``numel`` elements."""
    return Op("copy", "elementwise", False, dtype, 0.0, 2 * numel * DTYPE_BYTES[dtype])


def cast(source: str, target: str, numel: int) -> Op:
    """``numel`` elements read in one dtype and written in another. Its dtype is the narrower one's."""
    narrow = min(source, target, key=lambda dtype: DTYPE_BYTES[dtype])
    return Op("cast", "elementwise", False, narrow, 0.0, numel * (DTYPE_BYTES[source] + DTYPE_BYTES[target]))


def scale(dtype: str, numel: int) -> Op:
    """``numel`` elements multiplied by one number, in place."""
    return Op("scale", "elementwise", False, dtype, numel, 2 * numel * DTYPE_BYTES[dtype])


def grad_norm(dtype: str, numel: int) -> Op:
    """Sum of squares: one read."""
    return Op("grad_norm", "elementwise", False, dtype, 2 * numel, numel * DTYPE_BYTES[dtype])


def fused_step(optimizer: Optimizer, numel: int) -> Op:
    """A fused fp32 step: gradient read, parameters and states read and written."""
    return Op("fused_step", "optimizer", False, "fp32", 12 * numel, round(numel * OPTIMIZERS[optimizer].step_bytes))


def foreach_step(optimizer: Optimizer, numel: int) -> Op:
    """The same in torch's passes over lists."""
    return fused_step(optimizer, numel)._replace(n_bytes=numel * FOREACH[optimizer].step_bytes)


def plain_step(optimizer: Optimizer, numel: int) -> Op:
    """The same where plain torch takes it: fused where torch has that."""
    n_bytes = OPTIMIZERS[optimizer].plain_bytes or OPTIMIZERS[optimizer].step_bytes
    return fused_step(optimizer, numel)._replace(n_bytes=round(numel * n_bytes))


def frozen_step(numel: int) -> Op:
    """Adam with a frozen second moment, in passes of plain torch (``runtime.compress.frozen``): the first moment is mixed, the
    root of the second taken, scaled and shifted, parameters decayed and stepped."""
    n_bytes = numel * (12 + 8 + 8 + 8 + 8 + 16)
    return Op("frozen_step", "optimizer", False, "fp32", 9 * numel, n_bytes)


def around_step(
    dtype: str, numel: int, grad_dtype: str = "", *, narrow_masters: bool = False, narrow_states: int = 0
) -> tuple[Op, ...]:
    """The passes of this runtime before and after the fused step: low-precision gradients (of ``grad_dtype``; empty:
    ``dtype``) are widened, all are scaled, low-precision parameters are written back. Masters of ``dtype`` and so many states of
    it are widened before, and states written back after."""
    grad_dtype = grad_dtype or dtype
    widen = () if grad_dtype == "fp32" else (cast(grad_dtype, "fp32", numel),)
    write_back = () if dtype == "fp32" else (cast("fp32", dtype, numel),)
    n_widened, n_back = narrow_masters + narrow_states, narrow_states
    narrow = (*(cast(dtype, "fp32", numel),) * n_widened, *(cast("fp32", dtype, numel),) * n_back)
    return *widen, *narrow, scale("fp32", numel), *write_back


def dropout_add(dtype: str, numel: int) -> Op:
    """``residual + dropout(x)`` in one pass, the random numbers made on the way: two reads and one write."""
    return Op("dropout_add", "elementwise", False, dtype, 4 * numel, 3 * numel * DTYPE_BYTES[dtype])


def dropout_add_backward(dtype: str, numel: int) -> Op:
    """The residual's gradient is the incoming one; the other is masked and scaled: one read and one write."""
    return Op("dropout_add_backward", "elementwise", True, dtype, 2 * numel, 2 * numel * DTYPE_BYTES[dtype])
