"""A linear layer's products in the model's dtype or in fp8: operators, and what they need beside their operands.

fp8 products take operands with one scale each (tensorwise, from the largest magnitude of the moment), and an order of elements that
suits them, so that backward casts into a second, transposed copy. ``torchao``: ``Float8Linear`` (torchao/float8/float8_linear.py:
``matmul_with_hp_or_float8_args`` saves the operands as they were and casts them again in backward). ``te``: Transformer Engine with
current scaling (transformer_engine/pytorch/module/linear.py): the input is cast and transposed once, and only its fp8 copy is kept;
copies of the weights are made once per step and stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from estimator.ops.operator import Op
from estimator.ops.style import Style
from estimator.ops.tape import Tape
from estimator.sharding.units import Unit
from estimator.units import DTYPE_BYTES

FP8_MULTIPLE = 16
"""``torch._scaled_mm`` takes sizes that are multiples of so many elements; other layers stay as they are."""
BLOCK_PARTS = ("attention", "core_attention", "mlp")
"""Parts of a unit whose linear layers multiply in fp8: blocks', not the head's."""
_EAGER_CAST_BYTES = 12
"""Per element while plain torch casts: the fp32 copy, the scaled one and the clamped one."""


class Products(NamedTuple):
    """Of one linear layer."""

    forward: tuple[Op, ...]
    input_grad: tuple[Op, ...]
    weight_grad: tuple[Op, ...]
    forward_temp_bytes: int = 0
    backward_temp_bytes: int = 0
    kept_bytes: int = 0
    """Of the copy of the input that backward reads instead of the input."""

    @property
    def backward(self) -> tuple[Op, ...]:
        return (*self.input_grad, *self.weight_grad)


def in_fp8(t: Tape, n_in: int, n_out: int) -> bool:
    """Whether a layer of these widths multiplies in fp8 where the tape now is."""
    whole = n_in % FP8_MULTIPLE == n_out % FP8_MULTIPLE == t.rows % FP8_MULTIPLE == 0
    return bool(t.style.fp8) and whole and t.current_part in BLOCK_PARTS


def weight_copies_bytes(style: Style, arch: str, units: Iterable[Unit]) -> int:
    """fp8 copies of the weights of ``units``' linear layers that stay from step to step: as they lie, and transposed where the
    GPU's fp8 products take operands in one order only (before Blackwell)."""
    if style.fp8 != "te":
        return 0
    weights = (p for unit in units if unit.kind not in ("embed", "head") for p in unit.params if len(p.shape) >= 2)
    numel = sum(p.numel for p in weights if all(size % FP8_MULTIPLE == 0 for size in p.shape[-2:]))
    return numel * (1 if arch == "blackwell" else 2)


def products_of(t: Tape, n_in: int, n_out: int, *, input_is_cast: bool = False) -> Products:
    """``x @ W.T`` of all the tape's rows, and backward's two products. ``input_is_cast``: another layer has cast ``x`` already."""
    if in_fp8(t, n_in, n_out):
        return _fp8_products(t, n_in, n_out, input_is_cast)
    m, w = t.rows, t.width
    n_bytes = (m * n_in + n_in * n_out + m * n_out) * w
    return Products(*_three(t.dtype, m, n_in, n_out, n_bytes, n_bytes, n_bytes + _added_bytes(t, n_in * n_out)))


def _added_bytes(t: Tape, numel: int) -> int:
    """What a product moves beside its operands that adds a weight's gradient to its buffer instead of writing it."""
    return (2 * DTYPE_BYTES[t.grad_dtype or t.dtype] - t.width) * numel if t.style.fused_wgrad else 0


def _three(
    dtype: str, m: int, n_in: int, n_out: int, *n_bytes: int
) -> tuple[tuple[Op, ...], tuple[Op, ...], tuple[Op, ...]]:
    flops = 2.0 * m * n_in * n_out
    return (
        (Op("linear", "matmul", False, dtype, flops, n_bytes[0], (1, m, n_out, n_in)),),
        (Op("linear_dgrad", "matmul", True, dtype, flops, n_bytes[1], (1, m, n_in, n_out)),),
        (Op("linear_wgrad", "matmul", True, dtype, flops, n_bytes[2], (1, n_out, n_in, m)),),
    )


def _fp8_products(t: Tape, n_in: int, n_out: int, input_is_cast: bool) -> Products:
    m, w = t.rows, t.width
    n = Numel(m * n_in, n_in * n_out, m * n_out)
    written = n.weight * w + _added_bytes(t, n.weight)
    three = _three("fp8", m, n_in, n_out, n.x + n.weight + n.y * w, n.y + n.weight + n.x * w, n.x + n.y + written)
    return with_casts(t, n, Products(*three), input_is_cast=input_is_cast)


class Numel(NamedTuple):
    """Elements of a layer's input, weight and result."""

    x: int
    weight: int
    y: int


def with_casts(t: Tape, n: Numel, p: Products, *, input_is_cast: bool = False) -> Products:
    """``p``, three products in fp8, with what casts their operands."""
    if t.style.fp8 == "te":
        read = () if input_is_cast else (_cast(t, "cast_input", n.x, 2),)
        return Products(
            (*read, _cast(t, "cast_weight", n.weight, 2, times=t.style.weight_casts), *p.forward),
            (_cast(t, "cast_grad", n.y, 2, backward=True), *p.input_grad),
            p.weight_grad,
            forward_temp_bytes=0 if input_is_cast else n.x,
            backward_temp_bytes=2 * n.y,
            kept_bytes=0 if input_is_cast else n.x,
        )
    read = () if input_is_cast else (_cast(t, "cast_input", n.x, 1),)
    read_again = () if input_is_cast else (_cast(t, "cast_input_again", n.x, 1, backward=True),)
    at_once = 0 if t.style.compiled else _EAGER_CAST_BYTES
    of_weight = _cast(t, "cast_weight_again", n.weight, 1, backward=True)
    return Products(
        (*read, _cast(t, "cast_weight", n.weight, 1), *p.forward),
        (_cast(t, "cast_grad", n.y, 2, backward=True), of_weight, *p.input_grad),
        (*read_again, *p.weight_grad),
        forward_temp_bytes=max(at_once * max(n.x, n.weight), n.x + n.weight),
        backward_temp_bytes=max(at_once * max(n), 2 * n.y + max(n.x, n.weight)),
    )


def _cast(t: Tape, name: str, numel: int, copies: int, *, backward: bool = False, times: float = 1.0) -> Op:
    """The largest magnitude is found in one pass, ``copies`` in fp8 (as it lies, transposed) are written in another; plain torch
    has passes of its own for magnitudes, scaling and clamping in fp32, and for each transposed copy."""
    if t.style.compiled or t.style.fp8 == "te":
        n_bytes, launches = (2 * t.width + copies) * numel, 2
    else:
        n_bytes, launches = (3 * t.width + (t.width + 4) + 8 + 8 + (4 + 1) + 2 * (copies - 1)) * numel, 6 + copies - 1
    return Op(name, "elementwise", backward, t.dtype, 4.0 * numel * times, round(n_bytes * times), launches=launches)
