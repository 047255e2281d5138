"""What the kernels of the loss, the optimizer step and of many tensors cost, by hand."""

from __future__ import annotations

import pytest

from estimator.errors import InputError
from estimator.ops.kernels import bucket, cross_entropy, grad_norm, linear_cross_entropy, optimizer, quantize, tables
from estimator.ops.kernels.chip import H200


def test_rows_of_a_chunk() -> None:
    assert linear_cross_entropy.default_chunk_rows(8192, 4096, 128_256) == 1024  # 262 rows would do for the memory
    assert linear_cross_entropy.default_chunk_rows(65_536, 8192, 32_000) == 32_768  # 16778 rows, next power of two
    assert linear_cross_entropy.default_chunk_rows(100, 64, 1000) == 100
    assert linear_cross_entropy.default_chunk_rows(0, 64, 1000) == 1


def test_rows_of_logits_start_at_cache_lines() -> None:
    assert linear_cross_entropy.logits_stride(50_257, 2) == 50_304  # 786 lines of 64
    assert linear_cross_entropy.logits_stride(50_257, 4) == 50_272  # 1571 lines of 32
    assert linear_cross_entropy.logits_stride(128_256, 2) == 128_256
    assert linear_cross_entropy.logits_stride(1, 4) == 32


@pytest.mark.parametrize(
    ("rule", "name", "n_bytes", "flops", "launches"),
    [
        ("adamw", "adam_step", 28, 15, 1),  # parameter and two moments there and back, bf16 gradient, bf16 copy
        ("adam", "adam_step", 28, 16, 1),
        ("sgd", "sgd_step", 20, 7, 1),
        ("sgd_nesterov", "sgd_step", 20, 9, 1),
        ("lion", "lion_step", 20, 12, 1),
        ("adagrad", "adagrad_step", 20, 10, 1),
        ("lamb", "lamb_step", 40, 28, 3),  # moments and parameter read once more
    ],
)
def test_steps(rule: str, name: str, n_bytes: int, flops: int, launches: int) -> None:
    op = optimizer.cost(rule, 1000, 2, 2)
    assert (op.name, op.n_bytes, op.flops, op.launches) == (name, 1000 * n_bytes, 1000 * flops, launches)
    assert optimizer.cost(rule, 1000, 4).n_bytes == 1000 * n_bytes  # fp32 gradient, no copy


def test_steps_in_8_bits() -> None:
    assert optimizer.state_bytes("adamw", 1000) == 8000
    assert optimizer.state_bytes("adamw", 1000, eight_bit=True) == 2 * (1000 + 4 * 4)
    # parameter 8, gradient 2, copy 2; codes 1 and magnitudes there and back
    assert optimizer.cost("adamw", 1000, 2, 2, eight_bit=True).n_bytes == 12_000 + 2 * 2 * (1000 + 16)


def test_unknown_rule() -> None:
    with pytest.raises(InputError, match="adamw"):
        optimizer.cost("adamv", 1000, 2)


def test_tables_and_partial_sums() -> None:
    tile = H200.tile
    assert optimizer.chunk_elements(tile) == bucket.chunk_elements(tile, 4) == bucket.chunk_elements(tile, 2) == 8192
    assert [grad_norm.chunk_elements(tile, size) for size in (2, 4)] == [16_384, 16_384]
    sizes = (16_385, 1, 0)
    assert tables.n_chunks(sizes, 16_384) == 3
    assert grad_norm.partial_bytes(sizes, tile, 2) == 3 * 8
    assert optimizer.n_lists("adamw", copies=True) == 5 and optimizer.n_lists("sgd", copies=False) == 3
    assert optimizer.n_lists("adamw", copies=True, eight_bit=True) == 7
    assert tables.table_bytes(sizes, 5, 16_384) == 8 * (3 + 3 * (3 + 5))


def test_loss_scaled_after_its_gradient() -> None:
    """4 rows of 10 logits in bf16 (80 bytes): a factor of 1 is read and nothing else, another one costs both ways."""
    forward, backward = cross_entropy.cost(4, 10, "bf16", 2, early_gradient=True)
    scaled_forward, scaled = cross_entropy.cost(4, 10, "bf16", 2, early_gradient=True, factor_is_one=False)
    assert (backward.flops, backward.n_bytes) == (0, 4)
    assert (scaled.flops, scaled.n_bytes, scaled_forward) == (40, 4 + 2 * 80, forward)
    half_forward, half = cross_entropy.cost(
        4, 10, "fp16", 2, early_gradient=True
    )  # rows divided late, factor multiplied
    assert (half.flops, half.n_bytes, half.launches) == (40, 4 + 2 * 80 + 12, 2)
    assert half_forward.n_bytes == forward.n_bytes - 4
    in_backward = cross_entropy.cost(4, 10, "bf16", 2)
    assert cross_entropy.cost(4, 10, "bf16", 2, factor_is_one=False) == in_backward


@pytest.mark.parametrize("bias", [False, True])
def test_linear_loss_scaled_after_its_gradient(bias: bool) -> None:
    """h 12 x 8, weight 20 x 8, bias 20."""
    forward, backward = linear_cross_entropy.cost((12, 8, 20), "bf16", 2, bias=bias, chunk_rows=8)
    same, scaled = linear_cross_entropy.cost((12, 8, 20), "bf16", 2, bias=bias, chunk_rows=8, factor_is_one=False)
    assert same == forward
    assert backward[0].flops == 0 and scaled[0].flops == 96 + 160 + bias * 20
    assert scaled[0].n_bytes - backward[0].n_bytes == 2 * (2 * (96 + 160) + bias * 4 * 20)
    assert [op.n_bytes for op in backward[1:]] == ([20 * (4 + 2)] if bias else [])  # fp32 sums, rounded
    half = linear_cross_entropy.cost((12, 8, 20), "fp16", 2, bias=bias, chunk_rows=8)[1]
    assert half[0].n_bytes == scaled[0].n_bytes + 12 + 8 and half[0].launches == scaled[0].launches + 2
    # two chunks: 8 rows, then 4; the second adds to what the first wrote
    grad_weight = [op.n_bytes for op in forward if op.name == "head_grad_weight"]
    assert grad_weight == [8 * 20 * 2 + 8 * 8 * 2 + 320, 4 * 20 * 2 + 4 * 8 * 2 + 2 * 320]
    grad_bias = [op.n_bytes for op in forward if op.name == "head_grad_bias"]
    assert grad_bias == ([8 * 20 * 2 + 80, 4 * 20 * 2 + 4 * 80] if bias else [])


def test_codes() -> None:
    assert [quantize.code_bytes(1001, name) for name in ("int8", "int4", "e4m3")] == [1001, 501, 1001]
    assert quantize.stored_bytes(1001, "int4", 256) == 501 + 4 * 4
