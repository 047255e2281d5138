"""AdaComp kernels on the CPU shim: the same bits as plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.adacomp import cost, message_bytes
from runtime.kernels.adacomp import (
    AdaCompMessage,
    adacomp_add,
    adacomp_add_reference,
    adacomp_pack,
    adacomp_pack_reference,
)
from tests.runtime.kernels.checks import DTYPES, gradient_and_residual, needs_shim, on_shim
from tests.runtime.kernels.shim import guarded, intact

pytestmark = needs_shim


def same(got: AdaCompMessage, right: AdaCompMessage) -> None:
    n_sent = min(int(right.counts.sum()), len(right.entries)) if right.scale.isfinite() else 0
    assert torch.equal(got.entries[:n_sent], right.entries[:n_sent])
    assert torch.equal(got.counts, right.counts)
    torch.testing.assert_close(got.scale, right.scale, rtol=0, atol=0, equal_nan=True)
    assert got[3:] == right[3:]


def against_reference(grad: Tensor, residual: Tensor, bin: int, capacity: int | None = None, order: int = 0) -> None:
    kept = residual.clone()
    right = adacomp_pack_reference(grad, kept, bin, capacity)
    with on_shim(order):
        got = adacomp_pack(grad, residual, bin, capacity)
        dense = adacomp_add(got, torch.ones(grad.numel()))
    same(got, right)
    torch.testing.assert_close(residual, kept, rtol=0, atol=0, equal_nan=True)
    expected = adacomp_add_reference(right, torch.ones(grad.numel()))
    torch.testing.assert_close(dense, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_reference(dtype: torch.dtype) -> None:
    for numel, bin in ((5000, 500), (1003, 500), (1, 500), (0, 500), (40, 7), (5000, 4096)):
        against_reference(*gradient_and_residual(numel, dtype), bin)


def test_by_hand() -> None:
    """Two bins of four. In the first, 3 is the largest sum; 2 is sent too since its gradient alone would reach it in one
    more step. In the second everything is zero and nothing is sent."""
    grad = torch.tensor([3.0, 1.5, 0.5, -1.0, 0.0, 0.0, 0.0, 0.0])
    residual = torch.tensor([0.0, 0.5, 0.5, -1.0, 0.0, 0.0, 0.0, 0.0])
    with on_shim():
        message = adacomp_pack(grad, residual, 4)
        dense = adacomp_add(message, torch.zeros(8))
    assert message.counts.tolist() == [3, 0]
    assert message.scale.item() == 1.5  # the mean of the largest, 3 and 0
    assert message.entries[:3].tolist() == [0, 1, 3 - 2**15]
    assert dense.tolist() == [1.5, 1.5, 0, -1.5, 0, 0, 0, 0]
    assert residual.tolist() == [1.5, 0.5, 1.0, -0.5, 0, 0, 0, 0]


@settings(max_examples=40, deadline=None)
@given(
    numel=st.integers(0, 3000), bin=st.integers(1, 700), room=st.integers(0, 400), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_size(numel: int, bin: int, room: int, seed: int) -> None:
    grad, residual = gradient_and_residual(numel, seed=seed)
    grad[: numel // 3] = 0.25  # many that are equal
    residual[: numel // 3] = 0
    against_reference(grad, residual, bin, room, order=seed % 2)


def test_nothing_is_lost() -> None:
    """What is sent plus what stays is what there was, whatever the capacity."""
    for capacity in (None, 10, 0):
        grad, residual = gradient_and_residual(2000, torch.float32)
        total = residual.double() + grad.double()
        with on_shim():
            message = adacomp_pack(grad, residual, 100, capacity)
            sent = adacomp_add(message, torch.zeros(2000))
        assert int((sent != 0).sum()) == min(int(message.counts.sum()), len(message.entries))
        torch.testing.assert_close(sent.double() + residual, total, rtol=1e-6, atol=1e-6)


def test_residual_is_sent_in_the_end() -> None:
    """A gradient that is the same every step: what was received approaches what was given."""
    grad = torch.linspace(-1, 1, 512)
    residual, received = torch.zeros(512), torch.zeros(512)
    for _ in range(200):
        received = adacomp_add_reference(adacomp_pack_reference(grad, residual, 64), received)
    assert (received / 200 - grad).abs().max() < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_step_that_is_not_finite_is_seen_and_forgotten(value: float) -> None:
    grad, residual = gradient_and_residual(1000)
    before = residual.clone()
    grad[700] = value
    with on_shim():
        message = adacomp_pack(grad, residual, 100)
        dense = adacomp_add(message, torch.zeros(1000))
    assert message.scale.isnan()
    assert torch.equal(residual, before)
    assert dense.isnan().any()
    against_reference(grad, residual, 100)


def test_unaligned_and_guarded() -> None:
    for offset in (0, 1, 3):
        grad, start = gradient_and_residual(1001)
        residual, whole = guarded((1001,), torch.float32, offset)
        residual.copy_(start)
        against_reference(grad[1:], residual[1:], 500)
        assert intact(residual, whole)


def test_cost_is_what_launches_touch() -> None:
    grad, residual = gradient_and_residual(2000)
    with on_shim() as record:
        message = adacomp_pack(grad, residual, 500)
        touched, n_launches = record.n_bytes, len(record.launches)
        adacomp_add(message, torch.zeros(2000))
    n_sent, n_bins = int(message.counts.sum()), 4
    forward, back = cost(2000, 500, "bf16", 2, n_sent)
    entries, written_back, in_torch = 2 * (2000 - n_sent), 2000 * 4, 12 * n_bins + 4 * n_bins + 4
    assert touched - entries + written_back + in_torch == forward.n_bytes
    assert n_launches + 2 == forward.launches
    sparse = 8 * n_sent - 2000 * 4
    assert record.n_bytes - touched - entries + sparse + 12 * n_bins == back.n_bytes
    assert len(record.launches) - n_launches + 1 == back.launches


def test_message_is_small() -> None:
    message = adacomp_pack(torch.empty(500_000, device="meta"), torch.empty(500_000, device="meta"), 500, 10_000)
    assert message.wire_bytes == message_bytes(500_000, 500, 10_000) == 2 * 10_000 + 4 * 1000 + 4


def test_input_errors() -> None:
    grad, residual = gradient_and_residual(10)
    with pytest.raises(InputError, match="bin is 40000"):
        adacomp_pack(grad, residual, 40_000)
    with pytest.raises(InputError, match="capacity is -1"):
        adacomp_pack(grad, residual, 5, -1)
    with pytest.raises(InputError, match="residual is"):
        adacomp_pack(grad, residual.half(), 5)
    with pytest.raises(InputError, match="out is"):
        adacomp_add(adacomp_pack(grad, residual, 5), torch.zeros(3))
