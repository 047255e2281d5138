"""The operators in plain torch: what CPUs run. Gradients written by hand, memory, and what ``torch.compile`` makes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.kernels.activation import ACTIVATIONS, activate_reference, gated_activate_reference
from runtime.kernels.dropout import dropout_residual_reference
from runtime.kernels.norm import (
    add_layer_norm_reference,
    add_rms_norm_reference,
    layer_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from runtime.kernels.registry import switched_off
from runtime.kernels.rotary import rotate_reference
from tests.runtime.kernels.checks import gradients, lives, wide

EPS = 1e-5
Call = Callable[..., Tensor | tuple[Tensor, ...]]
Shapes = tuple[tuple[int, ...], ...]


def turn(x: Tensor, **options: bool) -> Tensor:
    """Rotates 6 of the channels."""
    angles = torch.arange(x.shape[1] * 3).view(-1, 3).to(x.dtype)
    return rotate_reference(x, angles.cos(), angles.sin(), **options)


X, ROW = (3, 4, 8), (8,)
CALLS: dict[str, tuple[Call, Shapes]] = {
    "rms_norm": (partial(rms_norm_reference, eps=EPS), (X, ROW)),
    "layer_norm": (partial(layer_norm_reference, eps=EPS), (X, ROW, ROW)),
    "add_rms_norm": (partial(add_rms_norm_reference, eps=EPS), (X, X, ROW)),
    "add_layer_norm": (partial(add_layer_norm_reference, eps=EPS), (X, X, ROW, ROW)),
    "rotate": (turn, ((2, 4, 3, 8),)),
    "rotate_interleaved": (partial(turn, interleaved=True), ((2, 4, 3, 8),)),
    **{f"gated_{name}": (partial(gated_activate_reference, name=name), (X, X)) for name in ACTIVATIONS},
    **{f"biased_{name}": (lambda x, b, name=name: activate_reference(x, name, b), (X, ROW)) for name in ACTIVATIONS},
}


def samples(shapes: Shapes, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


@pytest.mark.parametrize("name", CALLS)
def test_gradients_by_differences(name: str) -> None:
    call, shapes = CALLS[name]
    assert torch.autograd.gradcheck(call, tuple(x.requires_grad_() for x in samples(shapes, torch.float64)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CALLS)
def test_few_roundings_from_fp64(name: str, dtype: torch.dtype) -> None:
    """Each operation rounds to 16 bits, at most four of them one after the other."""
    call, shapes = CALLS[name]
    inputs = samples(shapes, dtype)
    with torch.no_grad():
        outputs, truths = call(*inputs), call(*wide(*inputs))
    outputs, truths = ((t if isinstance(t, tuple) else (t,)) for t in (outputs, truths))
    incoming = tuple(torch.ones_like(o) for o in outputs)
    _, grads = gradients(call, inputs, incoming)
    _, grad_truths = gradients(call, wide(*inputs), wide(*incoming))
    step = 4 * torch.finfo(dtype).eps
    for got, truth in zip((*outputs, *grads), (*truths, *grad_truths), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), truth, rtol=step, atol=step * float(truth.abs().max()))


def test_weights_of_another_dtype() -> None:
    (x, weight), incoming = samples((X, ROW), torch.bfloat16), samples((X,), torch.bfloat16)
    for call in (CALLS["rms_norm"][0], lambda a, w: layer_norm_reference(a, w, None, EPS)):
        (y,), grads = gradients(call, (x, weight.float()), incoming)
        (truth,), grad_truths = gradients(call, wide(x, weight), wide(*incoming))
        assert [t.dtype for t in (y, *grads)] == [torch.bfloat16, torch.bfloat16, torch.float32]
        for got, right in zip((y, *grads), (truth, *grad_truths), strict=True):
            torch.testing.assert_close(got.double(), right, rtol=2**-6, atol=2**-6)


def test_no_rows() -> None:
    x, weight = torch.empty(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    rms_norm_reference(x, weight, EPS).sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def test_lives() -> None:
    """RMSNorm computes in fp32; the others make nothing but results (a gated activation's backward: one more)."""

    def on_cpu(call: Callable[..., Any], *shapes: tuple[int, ...]) -> tuple[list[int], list[int]]:
        return lives(call, *shapes, device="cpu")

    two, one, n = (64, 32), (32,), 64 * 32 * 2
    row, param = 4 * 64, 2 * 32
    rms = [2 * n, 2 * n, row, -2 * n, n, -2 * n]  # widened, squares, inverse, y
    layer = [n, row // 2, row // 2]  # on a CPU the statistics are bf16, too
    x_hat, product, column_sum = 2 * n, 2 * n, 4 * 32
    forward, backward = on_cpu(CALLS["rms_norm"][0], two, one)
    assert forward == rms
    assert backward == [x_hat, product, column_sum, param, -column_sum, row, -product, n, -n, n, -row, -x_hat]
    assert on_cpu(CALLS["layer_norm"][0], two, one, one)[0] == layer
    assert on_cpu(CALLS["add_rms_norm"][0], two, two, one)[0] == [n, *rms]
    assert on_cpu(CALLS["add_layer_norm"][0], two, two, one, one)[0] == [n, *layer]
    assert on_cpu(lambda g, u: gated_activate_reference(g, u, "silu"), two, two) == ([n], [n, n, n, -n])
    assert on_cpu(lambda x: activate_reference(x, "gelu_tanh"), two) == ([n], [n])
    assert on_cpu(lambda x, r: dropout_residual_reference(x, r, 0.0), two, two) == ([n], [])
    table = torch.ones(16, 4, dtype=torch.bfloat16)
    assert on_cpu(lambda x: rotate_reference(x, table, table), (2, 16, 4, 16)) == ([n], [n])


def test_switched_off_is_the_reference() -> None:
    """On what stands for a GPU too: the same allocations as on the CPU."""
    call, shapes = (lambda x, w: rms_norm(x, w, EPS)), ((64, 32), (32,))
    with switched_off("rms_norm"):
        off = lives(call, *shapes)
    assert off == lives(call, *shapes, device="cpu") != lives(call, *shapes)


@pytest.mark.parametrize("name", ["add_rms_norm", "gated_silu", "rotate"])
def test_compiled(name: str) -> None:
    """``torch.compile`` leaves them alone; torch 2.11 would make wrong gradients of them."""
    call, shapes = CALLS[name]
    inputs = samples(shapes, torch.float32)
    compiled = torch.compile(call, backend="aot_eager")
    outputs = call(*inputs)
    incoming = tuple(map(torch.ones_like, outputs if isinstance(outputs, tuple) else (outputs,)))
    torch.testing.assert_close(gradients(compiled, inputs, incoming), gradients(call, inputs, incoming))
