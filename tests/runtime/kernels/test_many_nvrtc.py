"""The kernels that take many tensors compile to machine code for sm_80, sm_90 and sm_100 without spills."""

from __future__ import annotations

import pytest
import torch

from estimator.ops.kernels.chip import tile_of
from runtime.kernels import bucket, grad_norm, lamb, optimizer
from runtime.kernels.loader import Kernel
from runtime.kernels.rules import Adagrad, Adam, Lion, Rule, Sgd
from tests.runtime.kernels import nvrtc

nvrtc_module = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings and nvidia-cuda-nvrtc")
ARCHITECTURES = (80, 90, 100)
TILE = tile_of(90)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FAMILIES = {"optimizer", "optimizer8", "lamb", "grad_norm", "bucket"}


def step(rule: Rule, grad: torch.dtype, copy: torch.dtype | None, eight_bit: bool = False) -> Kernel:
    return optimizer._kernel(rule.name, eight_bit, grad, copy, TILE)


def unrolled(kernel: Kernel, unroll: int) -> Kernel:
    return kernel._replace(defines=tuple((key, unroll if key == "UNROLL" else value) for key, value in kernel.defines))


QUICK = [
    step(Adam(), BF16, BF16),
    step(Adam(), BF16, BF16, eight_bit=True),
    lamb._kernel("lamb_moments", grad=BF16, copy=None, n_lists=4, tile=TILE),
    grad_norm._compiled(BF16, TILE)[0],
    bucket._kernel((BF16, BF16), TILE),
]
RULES = (Adam(decoupled=False), Sgd(), Sgd(nesterov=True), Lion(), Adagrad())
ALL = [
    *QUICK,
    *(step(rule, grad, copy) for rule in RULES for grad, copy in ((FP16, FP16), (FP32, None))),
    step(Adam(), FP32, None),
    *(step(Adam(decoupled=False), grad, copy, eight_bit=True) for grad, copy in ((FP16, FP16), (FP32, None))),
    lamb._kernel("lamb_moments", grad=FP32, copy=None, n_lists=4, tile=TILE),
    *(lamb._kernel("lamb_apply", grad=FP32, copy=copy, n_lists=3 + bool(copy), tile=TILE) for copy in (BF16, None)),
    *(kernel for dtype in (FP16, FP32) for kernel in grad_norm._compiled(dtype, TILE)[:2]),
    *(unrolled(bucket._kernel(types, TILE), n) for types in ((BF16, FP32), (FP32, FP16)) for n in (2, 4)),
]


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
