"""Kernels that fill the messages of compressed collectives write where they are told, the same bits as plain torch."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from runtime.kernels.adacomp import adacomp_pack, adacomp_pack_reference
from runtime.kernels.one_bit import one_bit_pack, one_bit_sum
from runtime.kernels.quantize import dequantize_sum, quantize, quantize_reference
from tests.runtime.kernels.checks import needs_shim, on_shim

pytestmark = needs_shim

N = 4096
BF16 = torch.bfloat16


def values(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(0)).to(dtype)


def room(*sizes: tuple[int, torch.dtype]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.full((n,), 7, dtype=dtype) for n, dtype in sizes)


def test_quantize_and_dequantize() -> None:
    x = values(BF16)
    for launches in (True, False):
        for format, n_bytes in (("int8", N), ("int4", N // 2)):
            codes, scales = room((n_bytes, torch.uint8), (N // 256, torch.float32))
            (out,) = room((N, BF16))
            with on_shim() if launches else nullcontext():
                made = quantize(x, format, 256, into=(codes, scales))
                back = dequantize_sum(made, BF16, out=out)
            right = quantize_reference(x, format, 256)
            assert made.codes is codes and torch.equal(codes, right.codes) and torch.equal(scales, right.scales)
            assert back is out and torch.equal(out, dequantize_sum(right, BF16))


def test_signs() -> None:
    x, error = values(torch.float32), torch.zeros(N)
    bits, scales = room((N // 8, torch.uint8), (N // 1024, torch.float32))
    (out,) = room((N, BF16))
    with on_shim():
        made = one_bit_pack(x, error, 1024, into=(bits, scales))
        back = one_bit_sum(made, BF16, out=out)
    assert made.bits is bits and back is out
    assert torch.allclose(scales, x.view(-1, 1024).abs().mean(1))
    assert torch.equal(out > 0, x >= 0)
    assert torch.allclose(error, x - torch.where(x >= 0, 1, -1) * scales.repeat_interleave(1024), atol=1e-6)


def test_adacomp() -> None:
    x, kept = values(torch.float32), torch.zeros(N)
    residual = kept.clone()
    into = room((N // 8, torch.int16), (N // 512, torch.int32), (1, torch.float32))
    with on_shim():
        made = adacomp_pack(x, residual, 512, N // 8, into=into)  # type: ignore[arg-type]
    right = adacomp_pack_reference(x, kept, 512, N // 8)
    n_sent = min(int(right.counts.sum()), N // 8)
    assert made.entries is into[0] and torch.equal(into[0][:n_sent], right.entries[:n_sent])
    assert torch.equal(into[1], right.counts) and torch.equal(into[2], right.scale) and torch.equal(residual, kept)
