"""Rotary embedding and dropout kernels on the CPU shim against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels import dropout, rotary
from runtime.kernels.dropout import dropout_residual
from runtime.kernels.philox import dropout_of, factors
from runtime.kernels.rotary import rotate
from tests.runtime.kernels.checks import DTYPES, assert_close, at_offset, gradients, needs_shim, on_shim, wide

pytestmark = needs_shim


def tables(seq_len: int, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(seq_len).float(), 10_000 ** -(torch.arange(half) / half))
    return angles.cos(), angles.sin()


def norms(x: Tensor) -> Tensor:
    """Length of every head, the size of what a rotation adds up."""
    return x.double().norm(dim=-1, keepdim=True)


# Each is compiled anew: the quick tests see both layouts, every dtype, all channels and some of them.
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("interleaved", "dtype", "heads", "head_dim", "half"),
    [
        pytest.param(interleaved, dtype, *shape, marks=() if quick == (shape, dtype) else pytest.mark.slow)
        for interleaved, quick in ((False, ((2, 24, 8), torch.bfloat16)), (True, ((1, 10, 3), torch.float16)))
        for dtype in DTYPES
        for shape in ((3, 32, 16), (2, 24, 8), (1, 10, 3))
    ],
)
def test_rotation(dtype: torch.dtype, interleaved: bool, in_place: bool, heads: int, head_dim: int, half: int) -> None:
    x, grad = (torch.randn(2, 7, heads, head_dim).to(dtype) for _ in range(2))
    cos, sin = (t.to(dtype) for t in tables(7, half))

    def call(a: Tensor, c: Tensor = cos, s: Tensor = sin) -> Tensor:
        return rotate(a * 1, c.to(a.dtype), s.to(a.dtype), interleaved=interleaved, in_place=in_place)

    with on_shim():
        (y,), (grad_x,) = gradients(call, (x,), (grad,))
    (truth,), (grad_truth,) = gradients(call, wide(x), wide(grad))
    assert_close(y, truth, "y", norms(x))
    assert_close(grad_x, grad_truth, "grad_x", norms(grad))
    torch.testing.assert_close(y.double().norm(dim=-1), x.double().norm(dim=-1), rtol=2e-2, atol=1e-6)


def test_rotation_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 5)
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])  # a quarter turn, and none
    for interleaved, expected in ((False, [-3.0, 2.0, 1.0, 4.0, 5.0]), (True, [-2.0, 1.0, 3.0, 4.0, 5.0])):
        with on_shim():
            got = rotate(x, cos, sin, interleaved=interleaved)
        assert got.flatten().tolist() == expected
        assert rotate(x, cos, sin, interleaved=interleaved).flatten().tolist() == expected


def test_rotation_of_a_part_of_a_fused_projection_in_place() -> None:
    """Query heads inside [B, S, (Q + K + V) heads, D]: the others are not touched, and autograd sees the change."""
    weight = torch.randn(16, 5 * 16, requires_grad=True)
    h, (cos, sin) = torch.randn(2, 6, 16), tables(6, 8)

    def call() -> tuple[Tensor, Tensor]:
        fused = (h @ weight).unflatten(-1, (5, 16))
        queries = fused[:, :, :3]
        rotate(queries, cos, sin, in_place=True)
        grad = torch.autograd.grad(fused.square().sum() + fused[..., 0, 0].sum(), weight)[0]
        return fused.detach(), grad

    with on_shim():
        got = call()
    for a, b in zip(got, call(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_rotation_mistakes() -> None:
    x = torch.randn(2, 6, 3, 16)
    with pytest.raises(InputError, match=r"shape of cos, sin"):
        rotate(x, *tables(5, 8))
    with on_shim(), pytest.raises(InputError, match="stride of the channels"):
        rotate(x.transpose(2, 3).contiguous().transpose(2, 3), *tables(6, 8), in_place=True)


@pytest.mark.parametrize("in_place", [False, True])
def test_cost_of_rotation(in_place: bool) -> None:
    x, (cos, sin) = torch.randn(2, 6, 3, 16, requires_grad=True), tables(6, 8)
    with on_shim() as record:
        rotate(x * 1, cos, sin, in_place=in_place).sum().backward()
    forward, backward = rotary.cost((2, 6, 3, 16), 16, "fp32", 4, in_place=in_place)
    assert forward.n_bytes + backward.n_bytes == record.n_bytes
    assert len(record.launches) == 2


# ---- dropout ----------------------------------------------------------------------------------------------------------


def test_random_bits_are_philox() -> None:
    """Known answers of Random123 (Salmon et al. 2011, kat_vectors: philox4x32 10) for key and counter zero."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    bits = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    seed = torch.zeros(1, dtype=torch.int64)
    for threshold in sorted({*bits, *(b + 1 for b in bits)}):
        kept = factors(8, dropout_of(threshold / 65536), seed) != 0
        assert kept.tolist() == [b >= threshold for b in bits]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype: torch.dtype) -> None:
    seed = torch.tensor([-(2**60) + 77])
    for numel, offset in ((0, 0), (1, 0), (3000, 0), (1003, 1), (1004, 2)):
        x, residual, grad = (at_offset(torch.randn(numel).to(dtype), offset) for _ in range(3))
        x[:1] = torch.inf  # dropped or kept, never inf * 0
        with on_shim():
            (y,), grads = gradients(lambda a, r: dropout_residual(a, r, 0.3, seed), (x, residual), (grad,))
        (truth,), grad_truth = gradients(lambda a, r: dropout_residual(a, r, 0.3, seed), wide(x, residual), wide(grad))
        assert_close(y, truth, "y", x.double().abs().clamp(max=1e6) + residual.double().abs())
        assert_close(grads[0], grad_truth[0], "grad_x")
        assert torch.equal(grads[1], grad)
        assert not y.isnan().any()


@settings(max_examples=30, deadline=None)
@given(probability=st.floats(0, 0.999), seed=st.integers(-(2**63), 2**63 - 1))
def test_share_and_scale_of_dropout(probability: float, seed: int) -> None:
    n = 20_000
    kept = factors(n, dropout_of(probability), torch.tensor([seed]))
    share = float((kept == 0).double().mean())
    assert abs(share - probability) < 5 * (probability * (1 - probability) / n) ** 0.5 + 1e-4
    scale = dropout_of(probability).scale
    assert scale == pytest.approx(1 / (1 - probability), rel=2**-16 * scale)


def test_seeds_follow_torch() -> None:
    x = torch.ones(64)
    torch.manual_seed(5)
    first, second = (dropout_residual(x, x, 0.5) for _ in range(2))
    torch.manual_seed(5)
    with on_shim():
        again = dropout_residual(x, x, 0.5)
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_cost_of_dropout() -> None:
    x, residual = torch.ones(1003, requires_grad=True), torch.ones(1003)
    with on_shim() as record:
        dropout_residual(x, residual, 0.5).sum().backward()
    forward, backward = dropout.cost(1003, "fp32", 4)
    assert record.n_bytes == forward.n_bytes + backward.n_bytes


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_impossible_probability(probability: float) -> None:
    with pytest.raises(InputError, match="dropout probability"):
        dropout_residual(torch.ones(1), torch.ones(1), probability)
