"""Sizes and costs of norms, activations, rotary embedding and dropout, by hand."""

from __future__ import annotations

import pytest

from estimator.ops.kernels import activation, dropout, norm, rotary
from estimator.ops.kernels.chip import H200, aligned_pack


def test_accesses_of_aligned_tensors() -> None:
    assert [aligned_pack(2, row) for row in (4096, 12, 1001)] == [8, 4, 1]
    assert [aligned_pack(4, row) for row in (4096, 6)] == [4, 2]


@pytest.mark.parametrize(
    ("n_rows", "width", "itemsize", "expected"),
    [
        (8192, 4096, 2, 132 * 4),  # 256 threads to a row, 4 such blocks on each of 132 multiprocessors
        (100, 4096, 2, 100),  # a block to a row
        (100, 128, 2, 7),  # 8 threads to a row, 16 rows to a block of 128
        (10**6, 128, 2, 132 * 8),
        (10**6, 16, 2, 132 * 8),  # 2 packs, 2 threads, 64 rows to a block
        (65, 16, 2, 2),
        (65, 16, 4, 3),  # 4 packs of fp32, 32 rows to a block
        (10**6, 1001, 2, 132 * 16),  # 64 threads to a row
        (10**6, 16384, 2, 132),
    ],
)
def test_partial_rows_of_norms(n_rows: int, width: int, itemsize: int, expected: int) -> None:
    assert norm.partial_rows(n_rows, width, itemsize, H200) == expected


@pytest.mark.parametrize(
    ("n_rows", "width", "expected"),
    [
        (8192, 4096, 264),  # 512 packs are two blocks of columns: half of 528 blocks each
        (8192, 2048, 528),
        (70, 264, 36),  # 33 packs take 64 of 256 threads: 4 rows side by side, 9 blocks of 2 x 4 rows
        (1, 8, 256),  # a pack wide: every thread has a row of its own
    ],
)
def test_partial_rows_of_biased_activations(n_rows: int, width: int, expected: int) -> None:
    assert activation.partial_rows(n_rows, width, 2, H200) == expected


def test_cost_of_norms() -> None:
    """2 rows of 8 columns in bf16: 32 bytes each way, 16 of weight, 8 of statistics, a partial row of 32 written and read."""
    forward, backward = norm.cost(norm.NormCall(2, 8, "bf16", 2, True, n_partial=1))
    assert (forward.n_bytes, forward.flops, forward.launches) == (32 + 32 + 16 + 8, 4 * 16, 1)
    assert (backward.n_bytes, backward.flops, backward.launches) == (3 * 32 + 2 * 16 + 8 + 2 * 32, 10 * 16, 2)
    forward, backward = norm.cost(norm.NormCall(2, 8, "bf16", 2, False, True, True, n_partial=1))
    assert (forward.n_bytes, forward.launches) == (4 * 32 + 2 * 16 + 16, 1)
    assert (backward.n_bytes, backward.launches) == (4 * 32 + 3 * 16 + 16 + 4 * 32, 3)


def test_cost_of_activations() -> None:
    """100 elements of bf16."""
    forward, backward = activation.cost("silu", 100, "bf16", 2, gated=True)
    assert (forward.n_bytes, forward.flops, backward.n_bytes, backward.flops) == (600, 600, 1000, 1200)
    forward, backward = activation.cost("gelu", 100, "bf16", 2, gated=False, bias=10)
    assert (forward.n_bytes, forward.flops, forward.launches) == (420, 500, 1)
    assert (backward.n_bytes, backward.flops, backward.launches) == (640, 1300, 2)


def test_cost_of_rotation_and_dropout() -> None:
    """36 heads of 16 channels in fp32, 8 of them turned; tables of 6 positions."""
    forward, backward = rotary.cost((2, 6, 3, 16), 8, "fp32", 4, in_place=True)
    assert (forward.n_bytes, forward.flops) == (2 * 36 * 8 * 4 + 6 * 8 * 4, 3 * 36 * 8)
    assert (backward.n_bytes, backward.flops) == (2 * 36 * 16 * 4 + 6 * 8 * 4, 3 * 36 * 8)
    assert [op.n_bytes for op in dropout.cost(100, "bf16", 2)] == [608, 408]
