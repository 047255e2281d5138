"""1-bit packing on the CPU shim: the same signs as plain torch, scales and errors but for the order of a sum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.one_bit import cost
from runtime.kernels.one_bit import (
    Signs,
    one_bit_pack,
    one_bit_pack_reference,
    one_bit_sum,
    one_bit_sum_reference,
)
from tests.runtime.kernels.checks import DTYPES, at_offset, gradient_and_residual, needs_shim, on_shim
from tests.runtime.kernels.shim import guarded, intact

pytestmark = needs_shim


def against_reference(x: Tensor, error: Tensor, block: int, order: int = 0) -> Signs:
    kept = error.clone()
    right = one_bit_pack_reference(x, kept, block)
    with on_shim(order):
        got = one_bit_pack(x, error, block)
    assert torch.equal(got.bits, right.bits)
    assert got[2:] == right[2:]
    torch.testing.assert_close(got.scales, right.scales, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(error, kept, rtol=1e-6, atol=1e-6)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_of_the_reference(dtype: torch.dtype) -> None:
    for numel in (5000, 4096, 1, 0, 63):
        against_reference(*gradient_and_residual(numel, dtype), 64)


def test_by_hand() -> None:
    x, error = torch.tensor([1.0, -3.0, 0.0, 4.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    with on_shim():
        signs = one_bit_pack(x, error, 64)
        back = one_bit_sum(signs)
    assert signs.bits.tolist() == [0b1101] and signs.scales.tolist() == [2.0]  # the mean of 2, 2, 0, 4
    assert back.tolist() == [2.0, -2.0, 2.0, 2.0]
    assert error.tolist() == [0.0, 0.0, -2.0, 2.0]


@settings(max_examples=30, deadline=None)
@given(numel=st.integers(0, 6000), offset=st.integers(0, 3), seed=st.integers(0, 99), block=st.sampled_from([64, 2048]))
def test_any_size_and_alignment(numel: int, offset: int, seed: int, block: int) -> None:
    x, start = gradient_and_residual(numel, seed=seed)
    error, whole = guarded((numel,), torch.float32, offset)
    error.copy_(start)
    signs = against_reference(at_offset(x, offset), error, block, order=seed % 2)
    assert intact(error, whole)
    with on_shim():
        back = one_bit_sum(signs, torch.bfloat16)
    assert torch.equal(back, one_bit_sum_reference(signs, torch.bfloat16))


def test_nothing_is_lost() -> None:
    x, error = gradient_and_residual(1000, torch.float32)
    total = x.double() + error.double()
    with on_shim():
        back = one_bit_sum(one_bit_pack(x, error, 64))
    torch.testing.assert_close(back.double() + error, total, rtol=1e-6, atol=1e-6)


def test_error_is_sent_in_the_end() -> None:
    x = torch.linspace(-1, 1, 512)
    error, received = torch.zeros(512), torch.zeros(512)
    for _ in range(400):
        received += one_bit_sum_reference(one_bit_pack_reference(x, error, 64))
    assert (received / 400 - x).abs().max() < 0.02


def test_block_that_is_not_finite_keeps_its_error() -> None:
    x, error = gradient_and_residual(256)
    before = error.clone()
    x[70], x[200] = torch.nan, -torch.inf
    signs = against_reference(x, error, 64)
    assert signs.scales.isnan().tolist() == [False, True, False, True]
    assert torch.equal(error.view(4, 64)[1::2], before.view(4, 64)[1::2])
    with on_shim():
        assert one_bit_sum(signs).view(4, 64).isnan().all(1).tolist() == [False, True, False, True]


@pytest.mark.parametrize("pieces", [1, 3, 9])
def test_sum_of_received_pieces(pieces: int) -> None:
    packed = [one_bit_pack_reference(*gradient_and_residual(1003, seed=s), 64) for s in range(pieces)]
    received = Signs(torch.stack([p.bits for p in packed]), torch.stack([p.scales for p in packed]), 1003, 64)
    right = torch.stack([one_bit_sum_reference(p).double() for p in packed]).sum(0) / pieces
    with on_shim():
        got = one_bit_sum(received, torch.float32, 1 / pieces)
    torch.testing.assert_close(got.double(), right, rtol=1e-6, atol=1e-6)


def test_cost_is_what_launches_touch() -> None:
    x, error = gradient_and_residual(1001)
    forward, back = cost(1001, 64, "bf16", 2, pieces=2)
    with on_shim() as record:
        signs = one_bit_pack(x, error, 64)
        assert record.n_bytes + 1001 * 4 == forward.n_bytes  # the error is written back
        touched = record.n_bytes
        one_bit_sum(Signs(*(t.expand(2, -1) for t in signs[:2]), 1001, 64), torch.bfloat16)
    assert record.n_bytes - touched == back.n_bytes
    assert len(record.launches) == forward.launches + back.launches == 2


def test_sizes_on_the_wire() -> None:
    signs = one_bit_pack(torch.empty(4097, device="meta"), torch.empty(4097, device="meta"), 2048)
    assert (signs.bits.shape, signs.scales.shape) == ((513,), (3,))
    assert one_bit_sum(signs).shape == (4097,)


def test_input_errors() -> None:
    x, error = gradient_and_residual(100)
    with pytest.raises(InputError, match="block is 100"):
        one_bit_pack(x, error, 100)
    with pytest.raises(InputError, match="error is"):
        one_bit_pack(x, error[:50], 64)
    with pytest.raises(InputError, match="shapes of bits and scales"):
        one_bit_sum(one_bit_pack(x, error, 64)._replace(numel=300))
