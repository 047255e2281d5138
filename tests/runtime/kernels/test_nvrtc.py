"""Every kernel compiles to machine code for sm_80, sm_90 and sm_100, without spills; no GPU or driver is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from estimator.ops.kernels.norm import row_threads
from runtime.kernels import activation, columns, dropout, loader, norm, rotary
from runtime.kernels.loader import Kernel
from tests.runtime.kernels import nvrtc

nvrtc_module = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and nvidia-cuda-nvrtc")
ARCHITECTURES = (80, 90, 100)
META = torch.device("meta")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def norm_kernels(dtype: torch.dtype, width: int, rms: bool, flags: bool, pack: int = 0) -> list[Kernel]:
    """Forward and backward for whole accesses, with or without residual and dropout."""
    pack = pack or 16 // dtype.itemsize
    tile = loader.chip(META).tile
    rows = row_threads(width, pack, tile.row_elements)
    rows_back = row_threads(width, pack, tile.row_elements_backward)
    common = {"RMS": int(rms), "BIAS": int(not rms), "DROPOUT": int(flags)}
    reload = int(rows_back.lanes > 512)
    return [
        norm._forward_kernel((dtype, dtype), pack, width, rows, RESIDUAL=int(flags), **common),
        norm._backward_kernel((dtype, dtype), pack, width, rows_back, GRAD_SUM=int(flags), RELOAD=reload, **common),
    ]


def flat(name: str, act: str, dtype: torch.dtype, pack: int = 0) -> Kernel:
    return activation._flat_kernel(name, act, dtype, pack or 16 // dtype.itemsize, META)


def biased(name: str, act: str, dtype: torch.dtype) -> Kernel:
    return activation._biased_kernel(name, act, dtype, 16 // dtype.itemsize, 256, META)


QUICK = [
    columns._kernel(BF16),
    dropout._kernel("dropout_forward", BF16, 8, META),
    flat("gated_backward", "silu", BF16),
    biased("biased_backward", "gelu", BF16),
    rotary._kernel(BF16, BF16, 32, 64, 0, False, 8, META),
    *norm_kernels(BF16, 4096, rms=True, flags=True),
    *norm_kernels(BF16, 4096, rms=True, flags=False),
    *norm_kernels(BF16, 1024, rms=False, flags=False),
]
ALL = [
    *QUICK,
    *(columns._kernel(dtype) for dtype in (FP16, FP32)),
    *(dropout._kernel("dropout_forward", dtype, 16 // dtype.itemsize, META) for dtype in (FP16, FP32)),
    dropout._kernel("dropout_backward", BF16, 1, META),
    *(flat("gated_backward", act, dtype) for act in activation.ACTIVATIONS for dtype in (FP16, FP32)),
    flat("plain_forward", "silu", BF16, 1),
    *(biased("biased_forward", act, dtype) for act in activation.ACTIVATIONS for dtype in (FP16, FP32)),
    rotary._kernel(FP16, FP32, 8, 32, 64, True, 8, META),
    rotary._kernel(FP32, FP32, 8, 64, 0, True, 4, META),
    rotary._kernel(BF16, FP32, 1, 3, 4, False, 1, META),
    *(k for rms in (True, False) for k in norm_kernels(FP16, 128, rms, True)),
    *(k for rms in (True, False) for k in norm_kernels(FP32, 2048, rms, True)),
    *(k for rms in (True, False) for k in norm_kernels(BF16, 8192, rms, True)),
    *(k for rms in (True, False) for k in norm_kernels(BF16, 16384, rms, False)),
    *(k for rms in (True, False) for k in norm_kernels(BF16, 16383, rms, False, pack=1)),
]


def test_every_file_is_compiled() -> None:
    """Here, or in its family's own test."""
    elsewhere = [t.read_text() for t in Path(__file__).parent.glob("test_*.py") if t != Path(__file__)]
    for family in {path.stem for path in loader.FOLDER.glob("*.cu")} - {k.family for k in ALL}:
        assert any("nvrtc" in text and f'"{family}"' in text for text in elsewhere), f"{family}.cu is compiled nowhere"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch: int) -> None:
    for kernel in QUICK:
        nvrtc.assert_no_spills(kernel, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_variants_compile_without_spills(arch: int) -> None:
    for kernel in ALL:
        nvrtc.assert_no_spills(kernel, arch)


def test_vector_accesses() -> None:
    """The machine code holds 16-byte loads and stores, not element-wise ones: seen in the intermediate text."""
    text = nvrtc.intermediate("activation", flat("plain_forward", "relu", BF16).defines, 90)
    body = text.split(".entry plain_forward")[1].split(".entry")[0]
    assert "ld.global.L1::no_allocate.v4.u32" in body
    assert re.search(r"st\.global\.v4\.[ubf]32", body)
    assert "cvt.rn.bf16x2.f32" in body
