"""Flattening, unflattening and scaling on the CPU shim (and a GPU) against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.bucket import cost
from runtime.kernels.bucket import (
    copy_scaled,
    flatten,
    flatten_reference,
    scale_,
    scale_reference_,
    unflatten,
    unflatten_reference,
)
from tests.runtime.kernels.checks import DTYPES, assert_close, needs_shim
from tests.runtime.kernels.many import DEVICES, SIZES, clones, randoms, running, table_sizes
from tests.runtime.kernels.shim import guarded, intact

BF16 = torch.bfloat16
_QUICK = {(torch.float32, BF16), (BF16, torch.float32), (torch.float16, torch.float16)}
PAIRS = [
    pytest.param(source, target, marks=() if (source, target) in _QUICK else pytest.mark.slow)
    for source in DTYPES
    for target in DTYPES
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_there_and_back(source: torch.dtype, target: torch.dtype, device: str) -> None:
    tensors = randoms(SIZES, source, device, offsets=(0, 0, 5, 1))
    factor = torch.tensor([0.3], device=device)
    total = sum(SIZES)
    bucket = torch.full((total + 5,), 7.0, dtype=target, device=device)
    with running(device):
        flatten(tensors, bucket, factor)
    assert (bucket[total:] == 7).all()
    truth = torch.cat(tensors).double() * factor.double()
    assert_close(bucket[:total], truth)
    plain = torch.zeros_like(bucket)
    flatten_reference(tensors, plain, factor)
    assert torch.equal(plain[:total], bucket[:total])

    back, plain_back = clones(tensors), clones(tensors)
    with running(device):
        unflatten(plain, back)
    unflatten_reference(plain, plain_back)
    assert all(map(torch.equal, back, plain_back))
    torch.testing.assert_close(torch.cat(back), plain[:total].to(source), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_copies_without_a_factor_are_exact(device: str) -> None:
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-7, 65504.0, -6e-8]).half().to(device)
    out = [torch.empty(8, dtype=torch.float32, device=device)]
    tiny = [torch.tensor([1e-40, -1e-44, 0.5], device=device), torch.ones(3, device=device)]
    with running(device):
        copy_scaled([odd], out)
        copy_scaled(tiny[:1], tiny[1:])
    assert torch.equal(*tiny)
    torch.testing.assert_close(out[0], odd.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out[0].signbit()[1:], odd.signbit()[1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_scaling_in_place(dtype: torch.dtype, device: str) -> None:
    tensors = randoms(SIZES, dtype, device, offsets=(0, 3))
    plain, truth = clones(tensors), clones(tensors, torch.float64)
    factor = torch.tensor([1.7], device=device)
    with running(device):
        scale_(tensors, factor)
    scale_reference_(plain, factor)
    for got, reference, exact in zip(tensors, plain, truth, strict=True):
        assert torch.equal(got, reference)
        assert_close(got, exact * factor.double())


@needs_shim
@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=5), offset=st.integers(0, 7), seed=st.integers(0, 99))
def test_any_size_and_alignment(sizes: list[int], offset: int, seed: int) -> None:
    tensors = randoms(sizes, seed=seed, offsets=(offset, 0, 2))
    bucket, whole = guarded((sum(sizes),), BF16, offset)
    with running("cpu"):
        flatten(tensors, bucket)
    assert torch.equal(bucket, torch.cat(tensors).to(BF16))
    assert intact(bucket, whole)


@needs_shim
def test_same_bits_in_any_order_and_cost() -> None:
    tensors = randoms(SIZES)
    results = []
    for order in (0, 1):
        bucket = torch.zeros(sum(SIZES), dtype=BF16)
        with running("cpu", order) as record:
            flatten(tensors, bucket, torch.tensor([0.3]))
        results.append(bucket)
    assert torch.equal(*results)
    assert record is not None
    ((kernel, (table, n_chunks, _)),) = record.launches
    assert isinstance(table, Tensor) and isinstance(n_chunks, int)
    numel = sum(table_sizes(kernel, table, n_chunks))
    entry = cost(numel, ("fp32", 4), ("bf16", 2), scaled=True)
    assert (numel, entry.n_bytes, entry.launches) == (sum(SIZES), 6 * sum(SIZES) + 4, 1)


@pytest.mark.parametrize("device", DEVICES)
def test_a_thousand_tensors(device: str) -> None:
    tensors = randoms([i % 31 for i in range(1200)], device=device)
    bucket = torch.zeros(sum(t.numel() for t in tensors), dtype=BF16, device=device)
    with running(device):
        flatten(tensors, bucket)
    assert torch.equal(bucket, torch.cat(tensors).to(BF16))


def test_shapes_are_kept_and_empty_lists_do_nothing() -> None:
    tensors = [torch.arange(6.0).view(2, 3), torch.tensor(6.0), torch.ones(0)]
    bucket = torch.zeros(9)
    flatten(tensors, bucket)
    assert bucket.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0]
    unflatten(bucket * 2, tensors)
    assert tensors[0].tolist() == [[0, 2, 4], [6, 8, 10]]
    flatten([], bucket)
    flatten([t.to("meta") for t in tensors], bucket.to("meta"))


def test_bad_input() -> None:
    with pytest.raises(InputError, match=r"shape of the bucket is \(3,\); allowed: \[at least 4\]"):
        flatten([torch.ones(4)], torch.ones(3))
    with pytest.raises(InputError, match="factor is"):
        scale_([torch.ones(4)], torch.ones(2))
    with pytest.raises(InputError, match="strides of sources"):
        flatten([torch.ones(4, 4).T], torch.ones(16))
    with pytest.raises(InputError, match="number of sources is 1; allowed: 2"):
        copy_scaled([torch.ones(4)], [torch.ones(4), torch.ones(4)])
