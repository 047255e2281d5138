"""RMSNorm and LayerNorm kernels on the CPU shim against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.norm import NormCall, cost
from runtime.kernels import norm
from runtime.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from tests.runtime.kernels.checks import DTYPES, assert_close, at_offset, gradients, needs_shim, on_shim, wide

pytestmark = needs_shim

EPS = 1e-5


def samples(dtype: torch.dtype, *shape: int, seed: int = 0, offset: int = 0) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3
    return at_offset(x.to(dtype), offset)


def check(rms: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    params = (weight,) if rms or bias is None else (weight, bias)

    def call(a: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return rms_norm(a, w, EPS) if rms else layer_norm(a, w, b, EPS)

    grad = samples(x.dtype, *x.shape, seed=9)
    with on_shim():
        (y,), grads = gradients(call, (x, *params), (grad,))
    (truth,), grad_truth = gradients(call, wide(x, *params), wide(grad))
    # Sums over a row or a column carry an error of the size of what was summed.
    x64 = x.double() if rms else x.double() - x.double().mean(-1, keepdim=True)
    inverse = (x64.square().mean(-1, keepdim=True) + EPS).rsqrt()
    by_row = (grad.double() * weight.double()).abs().amax(-1, keepdim=True) * inverse
    by_column = (grad.double() * truth).abs().sum(0) + grad.double().abs().sum(0)
    offset = 0.0 if bias is None else (truth - bias.double()).abs() + bias.double().abs()
    assert_close(y, truth, "y", truth.abs() + offset + 1.0)
    assert_close(grads[0], grad_truth[0], "grad_x", by_row)
    for name, got, right in zip(("weight", "bias"), grads[1:], grad_truth[1:], strict=False):
        assert_close(got, right, f"grad_{name}", by_column)


# Each is compiled anew: the quick tests see every dtype, and rows inside a warp, unaligned and over several warps.
_QUICK = {(torch.float32, 40), (torch.bfloat16, 1001), (torch.float16, 4096)}


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize(
    ("dtype", "rows", "width"),
    [
        pytest.param(dtype, rows, width, marks=() if (dtype, width) in _QUICK else pytest.mark.slow)
        for dtype in DTYPES
        for rows, width in ((37, 40), (3, 1001), (2, 4096))
    ],
)
def test_widths(rms: bool, dtype: torch.dtype, rows: int, width: int) -> None:
    check(rms, samples(dtype, rows, width), samples(dtype, width, seed=1), samples(dtype, width, seed=2))


@pytest.mark.parametrize("rms", [True, False])
def test_widest_row(rms: bool) -> None:
    width = norm.MAX_WIDTH
    check(
        rms, samples(torch.bfloat16, 2, width), samples(torch.bfloat16, width), samples(torch.bfloat16, width, seed=2)
    )


def test_single_column_and_no_rows() -> None:
    check(True, samples(torch.float32, 5, 1), samples(torch.float32, 1), None)
    x, weight = torch.empty(0, 40), samples(torch.float32, 40).requires_grad_()
    with on_shim() as record:
        rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    assert [k.family for k, _ in record.launches] == ["columns"]


def test_weights_in_fp32_and_unaligned_input() -> None:
    check(True, samples(torch.bfloat16, 3, 40, offset=1), samples(torch.float32, 40), None)
    check(False, samples(torch.bfloat16, 3, 40), samples(torch.float32, 40), samples(torch.float32, 40, seed=4))


def test_odd_numbers() -> None:
    """A NaN or an infinity stays in its row; denormals and huge numbers are not flushed to anything else."""
    x = samples(torch.float32, 6, 40)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    x[2] *= 1e-41
    x[3] *= 1e17
    with on_shim():
        y = rms_norm(x, torch.ones(40), 1e-6)
        z = layer_norm(x, torch.ones(40), None, 1e-6)
    for got, truth in ((y, rms_norm(x.double(), torch.ones(40).double(), 1e-6)), (z, layer_norm(x.double(), torch.ones(40).double(), None, 1e-6))):  # fmt: skip
        assert bool(got[0].isnan().all()) and bool(got[1, 5].isnan())
        assert_close(got[2:], truth[2:], "rows without", 1.0)


@pytest.mark.parametrize(
    ("rms", "dtype", "probability"),
    [
        (True, torch.float32, 0.0),
        (False, torch.bfloat16, 0.25),
        pytest.param(True, torch.bfloat16, 0.25, marks=pytest.mark.slow),
        pytest.param(False, torch.float16, 0.0, marks=pytest.mark.slow),
    ],
)
def test_after_a_residual(rms: bool, dtype: torch.dtype, probability: float) -> None:
    rows, width, seed = 9, 40, torch.tensor([2**62 + 12345])
    x, residual = samples(dtype, rows, width), samples(dtype, rows, width, seed=1)
    weight, bias = samples(dtype, width, seed=2), samples(dtype, width, seed=3)
    incoming = (samples(dtype, rows, width, seed=4), samples(dtype, rows, width, seed=5))

    def call(a: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if rms:
            y, h = add_rms_norm(a, r, w, EPS, probability, seed)
            return y + 0 * b, h
        return add_layer_norm(a, r, w, b, EPS, probability, seed)

    with on_shim():
        (y, h), grads = gradients(call, (x, residual, weight, bias), incoming)
    (_, h_truth), _ = gradients(call, wide(x, residual, weight, bias), wide(*incoming))
    assert_close(h, h_truth, "h", x.double().abs() + residual.double().abs())

    # From here on h is the rounded one that the kernel went on with.
    def after(a: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return (rms_norm(a, w, EPS) + 0 * b if rms else layer_norm(a, w, b, EPS)), a * 1

    (truth, _), (grad_h, grad_weight, grad_bias) = gradients(after, wide(h, weight, bias), wide(*incoming))
    kept = torch.where((h_truth == residual.double()) & (x != 0), 0.0, 1 / (1 - probability))
    by_column = incoming[0].double().abs().sum(0) * 4
    assert_close(y, truth, "y", 4.0)
    assert_close(grads[0], grad_h * kept, "grad_x", grad_h.abs().amax())
    assert_close(grads[1], grad_h, "grad_residual", grad_h.abs().amax())
    assert_close(grads[2], grad_weight, "grad_weight", by_column)
    assert_close(grads[3], grad_bias, "grad_bias", by_column)
    assert 0.1 < float((kept == 0).double().mean()) < 0.4 or probability == 0


def test_only_one_output_used() -> None:
    """The gradient of the other one is absent, not zeros that somebody has to read."""
    x, residual, weight = samples(torch.float32, 4, 40), samples(torch.float32, 4, 40, seed=1), torch.ones(40)
    for used in (0, 1):

        def call(*a: Tensor, used: int = used) -> Tensor:
            return add_rms_norm(*a, EPS)[used] + 0 * a[2]  # type: ignore[call-arg]

        _, grads = gradients(call, (x, residual, weight), (x,))
        with on_shim():
            _, got = gradients(call, (x, residual, weight), (x,))
        for a, b in zip(got, grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_same_bits_in_any_order() -> None:
    x, weight, bias, grad = (
        samples(torch.float32, *s, seed=i) for i, s in enumerate(((50, 1001), (1001,), (1001,), (50, 1001)))
    )
    results = []
    for order in (0, 1):
        with on_shim(order):
            (y,), grads = gradients(lambda *a: layer_norm(*a, EPS), (x, weight, bias), (grad,))
        results.append((y, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_cost_is_what_launches_touch(rms: bool, residual: bool) -> None:
    rows, width = 37, 40
    x, other, weight, bias = (samples(torch.bfloat16, *s) for s in ((rows, width), (rows, width), (width,), (width,)))

    def call(a: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        if residual:
            return add_rms_norm(a, r, w, EPS, 0.1) if rms else add_layer_norm(a, r, w, b, EPS, 0.1)
        return (rms_norm(a, w, EPS) if rms else layer_norm(a, w, b, EPS),)

    with on_shim() as record:
        leaves = [t.requires_grad_() for t in (x, other, weight, bias)]
        out = call(*leaves)
        torch.autograd.backward(out, tuple(torch.ones_like(o) for o in out))
    n_partial = next(
        a for k, given in record.launches if k.family == "columns" for a in given if isinstance(a, Tensor)
    ).shape[0]
    facts = NormCall(rows, width, "bf16", 2, rms, not rms, residual, residual, n_partial)
    forward, backward = cost(facts)
    assert record.n_bytes == forward.n_bytes + backward.n_bytes
    assert len(record.launches) == forward.launches + backward.launches


def test_too_wide() -> None:
    x = torch.empty(1, norm.MAX_WIDTH + 1, device="meta")
    with pytest.raises(InputError, match="at most 16384"):
        rms_norm(x, x[0], EPS)


def test_second_derivatives_are_refused() -> None:
    x, weight = samples(torch.float32, 2, 40).requires_grad_(), samples(torch.float32, 40)
    with on_shim():
        (grad,) = torch.autograd.grad(rms_norm(x, weight, EPS).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()
