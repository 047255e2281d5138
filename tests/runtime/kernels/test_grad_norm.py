"""Norm and overflow check on the CPU shim (and a GPU) against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.grad_norm import cost
from runtime.kernels.grad_norm import gradient_factor, squares, squares_reference
from tests.runtime.kernels.checks import DTYPES, assert_close, needs_shim
from tests.runtime.kernels.many import DEVICES, SIZES, clones, randoms, running, table_sizes


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_fp64(dtype: torch.dtype, device: str) -> None:
    tensors = randoms((*SIZES, 70_001), dtype, device, offsets=(0, 1, 3, 0))
    with running(device):
        got = squares(tensors)
    assert got.device == tensors[0].device
    assert_close(got, squares_reference(clones(tensors, torch.float64)))
    assert_close(squares_reference(tensors), squares_reference(clones(tensors, torch.float64)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_one_odd_element_anywhere_is_found(odd: float, device: str) -> None:
    for tensor, place in ((0, 4), (2, 0), (2, 10_000), (3, 0), (4, 8191)):
        tensors = randoms(SIZES, torch.bfloat16, device, offsets=(0, 3))
        tensors[tensor][place] = odd
        with running(device):
            got = squares(tensors)
        assert got[1].item() == 1
        assert not got[0].isfinite()
        assert squares_reference(tensors)[1].item() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_finite_numbers_whose_squares_overflow_raise_no_flag(device: str) -> None:
    tensors = [torch.full((10,), 3e38, device=device), torch.full((3,), 1e-42, device=device)]
    with running(device):
        assert squares(tensors).tolist() == [math.inf, 0.0]


@needs_shim
@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40_000), min_size=1, max_size=5), offset=st.integers(0, 7), seed=st.integers(0, 99)
)
def test_any_size_and_alignment(sizes: list[int], offset: int, seed: int) -> None:
    tensors = randoms(sizes, torch.bfloat16, seed=seed, offsets=(offset, 0))
    with running("cpu"):
        got = squares(tensors)
    assert_close(got, squares_reference(clones(tensors, torch.float64)))


@needs_shim
def test_same_bits_in_any_order_and_cost() -> None:
    tensors = randoms((*SIZES, 70_001), torch.bfloat16, offsets=(0, 1))
    results = []
    for order in (0, 1):
        with running("cpu", order) as record:
            results.append(squares(tensors))
    assert torch.equal(*results)
    assert record is not None
    (kernel, (table, n_chunks, partial)), (_, (_, _, out)) = record.launches
    assert isinstance(table, Tensor) and isinstance(n_chunks, int) and isinstance(partial, Tensor)
    numel = sum(table_sizes(kernel, table, n_chunks))
    entry = cost(numel, "bf16", 2)
    assert numel == sum(SIZES) + 70_001
    assert (entry.n_bytes, entry.launches) == (2 * numel, len(record.launches))
    assert isinstance(out, Tensor) and partial.nbytes + out.nbytes < entry.n_bytes / 100  # what the entry leaves out


@pytest.mark.parametrize("device", DEVICES)
def test_a_thousand_tensors(device: str) -> None:
    tensors = randoms([i % 23 for i in range(1500)], torch.float16, device)
    with running(device):
        got = squares(tensors)
    assert_close(got, squares_reference(clones(tensors, torch.float64)))


def test_factor_is_torchs_clipping() -> None:
    grads = randoms((100, 3))
    scaled = [grad * 64 for grad in grads]
    for max_norm in (0.5, 1e6):
        theirs = [grad.clone().requires_grad_() for grad in grads]
        for leaf, grad in zip(theirs, grads, strict=True):
            leaf.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        factor = gradient_factor(squares_reference(scaled), 1 / 64, max_norm)
        assert factor.shape == (1,)
        torch.testing.assert_close(scaled[0] * factor, theirs[0].grad, rtol=1e-6, atol=0)
    assert gradient_factor(squares_reference(scaled), 1 / 64).tolist() == [1 / 64]
    assert gradient_factor(squares_reference(scaled), torch.tensor(0.25)).tolist() == [0.25]


def test_all_empty_none_and_meta() -> None:
    assert squares([torch.ones(0)]).tolist() == [0.0, 0.0]
    with pytest.raises(InputError, match="number of tensors is 0"):
        squares([])
    out = squares([torch.ones(9, device="meta")])
    assert out.is_meta and out.shape == (2,)


@needs_shim
def test_all_empty_through_the_kernel() -> None:
    with running("cpu"):
        assert squares([torch.ones(0), torch.ones(0)]).tolist() == [0.0, 0.0]
