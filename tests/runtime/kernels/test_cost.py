"""What launchers allocate beside the sizes that the estimator takes from ``estimator.ops.kernels``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from estimator.ops.kernels import activation as activation_sizes
from estimator.ops.kernels import norm as norm_sizes
from estimator.ops.kernels.chip import H200, Chip, chip_of
from runtime.kernels import loader
from runtime.kernels.activation import activate, gated_activate
from runtime.kernels.dropout import dropout_residual
from runtime.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from runtime.kernels.rotary import rotate
from tests.runtime.kernels.checks import lives

EPS = 1e-5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, WIDTH = 4096, 1024


def partial_rows(call: Callable[..., Any], width: int, *shapes: tuple[int, ...], dtype: torch.dtype) -> int:
    """Rows of fp32 that a backward pass allocates second, after the gradient of its input."""
    return lives(call, *shapes, dtype=dtype)[1][1] // (4 * width)


@pytest.mark.parametrize("chip", [H200, chip_of("volta", 80), chip_of("blackwell", 148)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_partial_rows(dtype: torch.dtype, chip: Chip) -> None:
    with loader.standing_for(chip):
        for width in (1, 16, 40, 128, 1001, 4096, 8192, 16384):
            for rows in (1, 7, 300, 8192, 262_144):
                shapes = (rows, width), (width,)
                norm = partial_rows(lambda x, w: rms_norm(x, w, EPS), width, *shapes, dtype=dtype)
                biased = partial_rows(lambda x, b: activate(x, "gelu", b), width, *shapes, dtype=dtype)
                assert norm == norm_sizes.partial_rows(rows, width, dtype.itemsize, chip), (rows, width)
                assert biased == activation_sizes.partial_rows(rows, width, dtype.itemsize, chip), (rows, width)


N = ROWS * WIDTH * 2
"""Bytes of a bf16 ``[ROWS, WIDTH]``."""
STATS, PARAM, PARTIAL = 4 * ROWS, 2 * WIDTH, 4 * WIDTH * norm_sizes.partial_rows(ROWS, WIDTH, 2, H200)
TWO, ONE = (ROWS, WIDTH), (WIDTH,)


@pytest.mark.parametrize("residual", [False, True])
def test_lives_of_norms(residual: bool) -> None:
    """Forward: y, h, statistics. Backward: one gradient for both addends, partial sums, gradients of the parameters."""
    outputs = [N, N] if residual else [N]
    if residual:
        rms = lives(lambda x, r, w: add_rms_norm(x, r, w, EPS), TWO, TWO, ONE)
        layer = lives(lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS), TWO, TWO, ONE, ONE)
    else:
        rms = lives(lambda x, w: rms_norm(x, w, EPS), TWO, ONE)
        layer = lives(lambda x, w, b: layer_norm(x, w, b, EPS), TWO, ONE, ONE)
    assert rms == ([*outputs, STATS], [N, PARTIAL, PARAM, -PARTIAL])
    assert layer == ([*outputs, STATS, STATS], [N, PARTIAL, PARTIAL, PARAM, PARAM, -PARTIAL, -PARTIAL])


def test_lives_of_norms_with_dropout() -> None:
    """A seed of 8 bytes, and the two addends have gradients of their own."""
    forward, backward = lives(lambda x, r, w: add_rms_norm(x, r, w, EPS, 0.1), TWO, TWO, ONE)
    assert forward == [8, N, N, STATS]
    assert backward == [N, N, PARTIAL, PARAM, -PARTIAL]


def test_lives_of_elementwise_kernels() -> None:
    slabs = 4 * WIDTH * activation_sizes.partial_rows(ROWS, WIDTH, 2, H200)
    table = torch.empty(512, 32, device="meta", dtype=torch.bfloat16)
    heads = (ROWS // 512, 512, WIDTH // 64, 64)
    assert lives(lambda g, u: gated_activate(g, u, "silu"), TWO, TWO) == ([N], [N, N])
    assert lives(lambda x: activate(x, "gelu"), TWO) == ([N], [N])
    assert lives(lambda x, b: activate(x, "gelu", b), TWO, ONE) == ([N], [N, slabs, PARAM, -slabs])
    assert lives(lambda x: rotate(x, table, table), heads) == ([N], [N])
    assert lives(lambda x, r: dropout_residual(x, r, 0.1), TWO, TWO) == ([8, N], [N])
