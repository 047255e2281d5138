"""The kernels of the loss and of compression compile to machine code for sm_80, sm_90 and sm_100 without spills."""

from __future__ import annotations

import pytest
import torch

from runtime.kernels import adacomp, cross_entropy, one_bit, quantize
from runtime.kernels.loader import Kernel
from tests.runtime.kernels import nvrtc
from tests.runtime.kernels.test_nvrtc import ARCHITECTURES, BF16, FP16, FP32, META

FAMILIES = {"cross_entropy", "loss_rows", "quantize", "dequantize", "adacomp", "one_bit"}


def stored(format: str, dtype: torch.dtype, block: int, aligned: bool = True, stochastic: bool = True) -> Kernel:
    return quantize._quantize_kernel(format, block, dtype, aligned, stochastic, META)


def read_back(format: str, dtype: torch.dtype, aligned: bool = True) -> Kernel:
    return quantize._dequantize_kernel(format, 256, dtype, aligned, META)


QUICK = [
    cross_entropy._kernel("row_losses", BF16, 1024, True),
    cross_entropy._over_rows("sum_rows"),
    stored("int4", BF16, 2048),
    read_back("int4", BF16),
    adacomp._kernel("adacomp_pack", BF16, 4, META),
    one_bit._kernel("one_bit_pack", BF16, 2048, True, META),
]
ALL = [
    *QUICK,
    *(cross_entropy._kernel("row_losses", t, n, s) for t in (BF16, FP16, FP32) for n in (32, 512) for s in (False, True)),
    *(cross_entropy._kernel("row_losses", t, 1024, s) for t in (BF16, FP16) for s in (False, True)),
    *(stored(f, t, 2048) for f in quantize.FORMATS for t in (FP16, FP32)),
    *(stored(f, BF16, 64, aligned=False, stochastic=False) for f in quantize.FORMATS),
    *(read_back(f, t, aligned) for f in quantize.FORMATS for t in (FP16, FP32) for aligned in (False, True)),
    *(adacomp._kernel("adacomp_pack", t, pack, META) for t, pack in ((BF16, 8), (FP32, 4), (FP16, 1))),
    *(one_bit._kernel("one_bit_pack", t, 2048, aligned, META) for t in (FP16, FP32) for aligned in (False, True)),
]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: int) -> None:
    assert {kernel.family for kernel in QUICK} == FAMILIES
    for kernel in QUICK:
        nvrtc.assert_no_spills(kernel, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_variants_compile_without_spills(arch: int) -> None:
    for kernel in ALL:
        nvrtc.assert_no_spills(kernel, arch)


def test_logits_move_in_whole_accesses() -> None:
    text = nvrtc.intermediate("cross_entropy", QUICK[0].defines, 90)
    body = text.split(".entry row_losses_and_gradients")[1].split(".entry")[0]
    assert body.count("ld.global.L1::no_allocate.v4.u32") >= 2 * cross_entropy.UNROLL
    assert "st.global.v4" in body and "ex2.approx.ftz.f32" in body
