"""Activation kernels on the CPU shim against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.activation import FLOPS, cost
from runtime.kernels.activation import ACTIVATIONS, activate, gated_activate
from tests.runtime.kernels.checks import DTYPES, assert_close, at_offset, gradients, needs_shim, on_shim, wide

pytestmark = needs_shim

ODD_NUMBERS = (0.0, -0.0, torch.inf, torch.nan, 1e-40, -1e-40, 1e-30, 88.0, -88.0, -30.0, 30.0, 5.5, -5.5, 12.0, -12.0)

# Each pair is compiled anew: the quick tests see every activation once and every dtype.
_QUICK = dict.fromkeys(ACTIVATIONS, torch.float32) | {"silu": torch.bfloat16, "relu_squared": torch.float16}
CASES = [
    pytest.param(name, dtype, marks=() if dtype == _QUICK[name] else pytest.mark.slow)
    for name in ACTIVATIONS
    for dtype in DTYPES
]


def samples(dtype: torch.dtype, *shape: int, seed: int = 0, offset: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(*shape, generator=generator) * 3).to(dtype)
    return at_offset(x, offset)


# erfc's tail and 1 / (1 + e^u) multiply the rounding of their fp32 argument; at -5.5 by up to 30.
def tail(x: Tensor) -> Tensor:
    return x.double().abs().clamp(max=1.0)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_gated(name: str, dtype: torch.dtype) -> None:
    for rows, width, offsets in ((3, 1001, (0, 0, 0)), (1, 1, (0, 0, 0)), (40, 257, (3, 3, 3)), (5, 33, (1, 2, 0))):
        gate, up, grad = (samples(dtype, rows, width, seed=i, offset=o) for i, o in enumerate(offsets))
        with on_shim():
            (y,), grads = gradients(lambda g, u: gated_activate(g, u, name), (gate, up), (grad,))
        (truth,), grad_truth = gradients(lambda g, u: gated_activate(g, u, name), wide(gate, up), wide(grad))
        assert_close(y, truth, "y", (tail(gate) * up.double()).abs())
        assert_close(grads[0], grad_truth[0], "grad_gate", (grad.double() * up.double()).abs())
        assert_close(grads[1], grad_truth[1], "grad_up", (grad.double() * tail(gate)).abs())


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_biased(name: str, dtype: torch.dtype) -> None:
    for rows, width in ((70, 264), (3, 37), (600, 8)):
        x, bias, grad = samples(dtype, rows, width), samples(dtype, width, seed=1), samples(dtype, rows, width, seed=2)
        with on_shim():
            (y,), grads = gradients(lambda a, b: activate(a, name, b), (x, bias), (grad,))
        (truth,), grad_truth = gradients(lambda a, b: activate(a, name, b), wide(x, bias), wide(grad))
        # x + bias is rounded to fp32 before the activation sees it.
        size = x.double().abs() + bias.double().abs()
        assert_close(y, truth, "y", size)
        assert_close(grads[0], grad_truth[0], "grad_x", grad.double().abs() * (1 + size))
        assert_close(grads[1], grad_truth[1], "grad_bias", (grad.double().abs() * (1 + size)).sum(0))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_odd_numbers(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor(ODD_NUMBERS).to(dtype)
    with on_shim():
        (y,), (grad,) = gradients(lambda a: activate(a, name), (x,), (torch.ones_like(x),))
    (truth,), (grad_truth,) = gradients(lambda a: activate(a, name), wide(x), wide(torch.ones_like(x)))
    assert_close(y, truth, "y", tail(x))
    finite = x.isfinite() | x.isnan()  # derivatives at infinity are inf * 0 in one form and 1 in another
    assert_close(grad[finite], grad_truth[finite], "grad", 1.0)


@settings(max_examples=40, deadline=None)
@given(numel=st.integers(0, 5000), offset=st.integers(0, 7), seed=st.integers(0, 99))
def test_any_size_and_alignment(numel: int, offset: int, seed: int) -> None:
    x, grad = (samples(torch.bfloat16, numel, seed=seed + i, offset=offset) for i in (0, 1))
    with on_shim():
        (y,), (grad_x,) = gradients(lambda a: activate(a, "silu"), (x,), (grad,))
    (truth,), (grad_truth,) = gradients(lambda a: activate(a, "silu"), wide(x), wide(grad))
    assert_close(y, truth, "y")
    assert_close(grad_x, grad_truth, "grad_x", grad.double().abs())


def test_same_bits_in_any_order() -> None:
    x, bias, grad = (
        samples(torch.float32, 300, 264),
        samples(torch.float32, 264),
        samples(torch.float32, 300, 264, seed=2),
    )
    results = []
    for order in (0, 1):
        with on_shim(order):
            (y,), grads = gradients(lambda a, b: activate(a, "gelu", b), (x, bias), (grad,))
        results.append((y, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_cost_is_what_launches_touch() -> None:
    gate, up, grad = (samples(torch.bfloat16, 7, 128, seed=i) for i in range(3))
    forward, backward = cost("silu", gate.numel(), "bf16", 2, gated=True)
    with on_shim() as record:
        gradients(lambda g, u: gated_activate(g, u, "silu"), (gate, up), (grad,))
    assert record.n_bytes == forward.n_bytes + backward.n_bytes == (3 + 5) * 7 * 128 * 2
    assert len(record.launches) == forward.launches + backward.launches == 2


def test_cost_of_a_biased_call() -> None:
    x, bias, grad = samples(torch.bfloat16, 7, 128), samples(torch.bfloat16, 128), samples(torch.bfloat16, 7, 128)
    forward, backward = cost("gelu", x.numel(), "bf16", 2, gated=False, bias=128)
    with on_shim() as record:
        gradients(lambda a, b: activate(a, "gelu", b), (x, bias), (grad,))
    partial = next(a for k, given in record.launches if k.family == "columns" for a in given if isinstance(a, Tensor))
    assert record.n_bytes - 2 * partial.numel() * 4 == forward.n_bytes + backward.n_bytes
    assert len(record.launches) == forward.launches + backward.launches == 3


def test_every_activation_has_a_cost() -> None:
    assert FLOPS.keys() == ACTIVATIONS.keys()


def test_unknown_activation() -> None:
    with pytest.raises(InputError, match="did you mean 'gelu_tanh'"):
        activate(torch.ones(3), "gelu_tan")
