"""Quantisation kernels on the CPU shim: the same bits as plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.quantize import code_bytes, cost
from runtime.kernels.quantize import (
    FORMATS,
    Quantized,
    dequantize_sum,
    dequantize_sum_reference,
    quantize,
    quantize_reference,
)
from tests.runtime.kernels.checks import at_offset, needs_shim, on_shim

pytestmark = needs_shim

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    *((BF16, format, stochastic) for format in FORMATS for stochastic in (False, True)),
    *((FP32, "int8", False), (FP32, "e4m3", True), (FP16, "int4", True), (FP16, "e5m2", False)),
]
"""Every format; not every combination, since each is compiled for itself."""
SEED = torch.tensor([-(2**61) + 12345])


def samples(dtype: torch.dtype, numel: int, seed: int = 0, offset: int = 0) -> Tensor:
    """Blocks of very different size."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(torch.randint(-12, 12, (-(-numel // 64),), generator=generator).float()).repeat_interleave(64)
    return at_offset((torch.randn(numel, generator=generator) * spread[:numel]).to(dtype), offset)


def same(got: Quantized, right: Quantized) -> None:
    assert got[2:] == right[2:]
    torch.testing.assert_close(got.codes, right.codes, rtol=0, atol=0)
    torch.testing.assert_close(got.scales, right.scales, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("dtype", "format", "stochastic"), CASES)
def test_bits_of_the_reference(dtype: torch.dtype, format: str, stochastic: bool) -> None:
    seed = SEED if stochastic else None
    for numel, block, offset in ((5000, 64, 0), (1, 64, 0), (0, 64, 0)):
        x = samples(dtype, numel, offset=offset)
        with on_shim():
            got = quantize(x, format, block, seed)
            back = dequantize_sum(got, BF16)
        right = quantize_reference(x, format, block, seed)
        same(got, right)
        assert torch.equal(back, dequantize_sum_reference(right, BF16))


@pytest.mark.parametrize("format", FORMATS)
def test_error_is_half_a_step(format: str) -> None:
    x = samples(BF16, 4096)
    with on_shim():
        stored = quantize(x, format, 64)
        back = dequantize_sum(stored)
    scale = stored.scales.repeat_interleave(64)
    if format.startswith("int"):
        step = scale
    else:  # neighbours of a float: 2^-3 or 2^-2 of it, and those of the smallest
        mantissa, bias = {"e4m3": (3, 7), "e5m2": (2, 15)}[format]
        step = torch.maximum(x.abs() * 2.0**-mantissa, scale * 2.0 ** (1 - bias - mantissa))
    assert ((back - x).abs() <= 0.5001 * step).all()
    assert ((back - x).abs() > 0.2 * step).any(), "the bound is not idle"


@pytest.mark.parametrize("format", ["e4m3", "e5m2"])
def test_floats_are_torchs(format: str) -> None:
    """With a scale of one, nearest rounding is torch's cast."""
    dtype = FORMATS[format].float8[3]  # type: ignore[index]
    largest = FORMATS[format].largest
    x = torch.cat((torch.linspace(-largest, largest, 2000), torch.logspace(-8, 2, 2095), torch.tensor([largest])))
    for part in x.view(-1, 64):
        part[0] = largest
    with on_shim():
        stored = quantize(x, format, 64)
    assert (stored.scales == 1).all()
    assert torch.equal(stored.codes, x.to(dtype).view(torch.uint8))
    assert torch.equal(dequantize_sum_reference(stored), x.to(dtype).float())


def test_by_hand() -> None:
    x = torch.zeros(64, dtype=BF16)
    x[:5] = torch.tensor([7.0, -7.0, 2.5, 3.5, -0.4])
    with on_shim():
        int4, int8 = quantize(x, "int4", 64), quantize(x, "int8", 64)
    assert int4.scales.item() == 1.0
    assert int4.codes[:3].tolist() == [0x97, 0x42, 0x00]  # 7 and -7; 2 and 4 (ties to even); -0
    assert int8.codes[:5].view(torch.int8).tolist() == [127, -127, 45, 64, -7]


@pytest.mark.parametrize("format", FORMATS)
def test_stochastic_rounding_is_fair(format: str) -> None:
    """The mean over many seeds comes closer to the element than nearest rounding can."""
    x = samples(torch.float32, 256, seed=3)
    total = sum(dequantize_sum_reference(quantize_reference(x, format, 64, torch.tensor([s]))) for s in range(400))
    scale = quantize_reference(x, format, 64).scales.repeat_interleave(64)
    step = scale if format.startswith("int") else torch.maximum(x.abs() * 0.25, scale * 2.0**-9)
    assert isinstance(total, Tensor)
    assert ((total / 400 - x).abs() <= 5 * 0.5 * step / 400**0.5).all()  # five standard errors


def test_seeds() -> None:
    x = samples(BF16, 1000)
    with on_shim():
        a, b, c = (quantize(x, "int8", 64, torch.tensor([s])).codes for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(("dtype", "format", "stochastic"), CASES)
def test_odd_numbers(dtype: torch.dtype, format: str, stochastic: bool) -> None:
    x = torch.ones(6, 64, dtype=dtype)
    x[0, 3], x[1, 60], x[2] = torch.nan, -torch.inf, 0.0
    x[3] = 1e-38 if dtype != torch.float16 else 6e-8
    x[4, 7] = 2.0 ** (126 if dtype != torch.float16 else 15)
    seed = SEED if stochastic else None
    with on_shim():
        stored = quantize(x, format, 64, seed)
        back = dequantize_sum(stored, BF16 if dtype == BF16 else FP32).view(x.shape)
    same(stored, quantize_reference(x, format, 64, seed))
    assert back[:2].isnan().all(), "a block that is not finite does not pass for one"
    assert (back[2] == 0).all()
    torch.testing.assert_close(back[3], torch.zeros(64).to(back) if dtype != torch.float16 else x[3].to(back))
    torch.testing.assert_close(back[4, 7], x[4, 7].to(back))
    torch.testing.assert_close(back[5], torch.ones(64).to(back))


@pytest.mark.parametrize("format", FORMATS)
def test_sum_of_received_pieces(format: str) -> None:
    for numel, pieces in ((1000, 1), (129, 3), (1000, 8)):
        parts = [quantize_reference(samples(torch.float32, numel, seed=s), format, 64) for s in range(pieces)]
        received = Quantized(
            torch.stack([p.codes for p in parts]), torch.stack([p.scales for p in parts]), *parts[0][2:]
        )
        each = torch.stack([dequantize_sum_reference(p).double() for p in parts])
        for dtype in (FP32, BF16):
            with on_shim():
                got = dequantize_sum(received, dtype, 1 / pieces)
            right = each.sum(0) / pieces
            error = (got.double() - right).abs() - 1e-6 * each.abs().sum(0)
            assert (error <= (right.abs() * 2.0**-8 if dtype == BF16 else 0)).all()


@settings(max_examples=40, deadline=None)
@given(
    numel=st.integers(0, 6000), offset=st.integers(0, 7), seed=st.integers(0, 99), block=st.sampled_from([64, 2048]),
)  # fmt: skip
def test_any_size_and_alignment(numel: int, offset: int, seed: int, block: int) -> None:
    x = samples(BF16, numel, seed, offset)
    with on_shim(seed % 2):
        got = quantize(x, "int4", block, torch.tensor([seed]))
        back = dequantize_sum(got, BF16)
    right = quantize_reference(x, "int4", block, torch.tensor([seed]))
    same(got, right)
    assert torch.equal(back, dequantize_sum_reference(right, BF16))


def test_cost_is_what_launches_touch() -> None:
    x = samples(BF16, 1001)
    for format, pieces in (("int8", 1), ("int4", 3)):
        forward, back = cost(1001, format, 64, "bf16", 2, pieces=pieces, stochastic=True)
        with on_shim() as record:
            stored = quantize(x, format, 64, SEED)
            assert record.n_bytes == forward.n_bytes
            codes, scales = (t.expand(pieces, -1) for t in stored[:2])
            dequantize_sum(Quantized(codes, scales, *stored[2:]), BF16)
        assert record.n_bytes - forward.n_bytes == back.n_bytes
        assert len(record.launches) == forward.launches + back.launches == 2


def test_sizes_on_the_wire() -> None:
    assert [code_bytes(1001, f) for f in ("int8", "int4", "e4m3")] == [1001, 501, 1001]
    x = torch.empty(1001, dtype=BF16, device="meta")
    stored = quantize(x, "int4", 256)
    assert (stored.codes.shape, stored.scales.shape) == ((501,), (4,))
    assert dequantize_sum(stored).shape == (1001,)


def test_input_errors() -> None:
    x = torch.ones(100)
    with pytest.raises(InputError, match="did you mean 'int8'"):
        quantize(x, "int9", 64)
    with pytest.raises(InputError, match="block is 100"):
        quantize(x, "int8", 100)
    stored = quantize(x, "int8", 64)
    with pytest.raises(InputError, match="shapes of codes and scales"):
        dequantize_sum(stored._replace(numel=300))
