"""LAMB on the CPU shim (and a GPU) against fp64 and the paper's formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.optimizer import cost
from runtime.kernels.lamb import lamb_apply, lamb_apply_reference, lamb_moments, lamb_moments_reference, lamb_step
from runtime.kernels.rules import Control, Lamb
from tests.runtime.kernels.checks import assert_close, needs_shim
from tests.runtime.kernels.many import DEVICES, SIZES, clones, randoms, running, table_sizes

BF16 = torch.bfloat16
RULE = Lamb(weight_decay=0.1)
TYPES = [
    (BF16, BF16),
    pytest.param(torch.float32, None, marks=pytest.mark.slow),
    pytest.param(torch.float16, torch.float16, marks=pytest.mark.slow),
]


def by_the_paper(p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, step: int, lr: float) -> np.ndarray:
    """Algorithm 2 of You et al. 2020, phi(z) = z."""
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g**2
    r = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-6)
    u = r + 0.1 * p
    ratio = np.linalg.norm(p) / np.linalg.norm(u) if np.linalg.norm(p) and np.linalg.norm(u) else 1.0
    return p - lr * ratio * u


def problem(
    device: str, grad: torch.dtype = BF16, copy: torch.dtype | None = BF16
) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]], list[Tensor] | None]:
    params, grads = (
        randoms(SIZES, device=device, offsets=(0, 1, 3)),
        randoms(SIZES, grad, device, seed=1, offsets=(0, 3)),
    )
    states = [[x.abs_() for x in randoms(SIZES, device=device, seed=s, offsets=(0, 1, 3))] for s in (2, 3)]
    return params, grads, states, None if copy is None else randoms(SIZES, copy, device)


def control_of(device: str, skip: float = 0.0) -> Control:
    step, factor, flag = (torch.tensor([x], device=device) for x in (4.0, 0.5, skip))
    return Control(lr=0.01, step=step, factor=factor, skip=flag)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("grad_type", "copy_type"), TYPES)
def test_against_the_paper(grad_type: torch.dtype, copy_type: torch.dtype | None, device: str) -> None:
    params, grads, states, copies = problem(device, grad_type, copy_type)
    before = [[x.double().cpu().numpy().copy() for x in group] for group in (params, grads, *states)]
    with running(device):
        lamb_step(RULE, params, grads, states, control_of(device), copies)
    for i, param in enumerate(params):
        p, g, m, v = (group[i] for group in before)
        truth = torch.from_numpy(by_the_paper(p, 0.5 * g, m, v, 4, 0.01)).to(device)
        assert_close(param, truth, "parameters", 1.0)
        assert copies is None or torch.equal(copies[i], param.to(copies[i].dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_the_reference_is_the_paper_too(device: str) -> None:
    params, grads, states, _ = problem(device)
    params, states = clones(params, torch.float64), [clones(group, torch.float64) for group in states]
    before = [[x.double().cpu().numpy().copy() for x in group] for group in (params, grads, *states)]
    norms = lamb_moments_reference(RULE, params, grads, states, control_of(device))
    lamb_apply_reference(RULE, params, norms, states, control_of(device))
    for i, param in enumerate(params):
        p, g, m, v = (group[i] for group in before)
        np.testing.assert_allclose(param.cpu().numpy(), by_the_paper(p, 0.5 * g, m, v, 4, 0.01), rtol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_norms_are_each_tensors_own(device: str) -> None:
    """Shards' norms sum to the whole tensor's."""
    params, grads, states, _ = problem(device)
    truth = clones(params, torch.float64), grads, [clones(group, torch.float64) for group in states]
    with running(device):
        norms = lamb_moments(RULE, params, grads, states, control_of(device))
    expected = lamb_moments_reference(RULE, *truth, control_of(device))
    assert norms.shape == (len(SIZES), 2)
    assert_close(norms, expected, "norms", rel=2e-6)
    assert norms[1].tolist() == [0.0, 0.0]  # an empty tensor

    params, grads, states, _ = problem(device)
    halves = [
        [part for x in group for part in (x[: x.numel() // 2], x[x.numel() // 2 :])]
        for group in (params, grads, *states)
    ]
    with running(device):
        parts = lamb_moments(RULE, halves[0], halves[1], halves[2:], control_of(device))
    assert_close(parts.view(-1, 2, 2).double().sum(1).float(), expected, "sums of halves", rel=2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_a_skipped_step_writes_nothing(device: str) -> None:
    params, grads, states, copies = problem(device)
    assert copies is not None
    grads[2][5] = math.nan
    tensors = [*params, *states[0], *states[1], *copies]
    before = clones(tensors)
    with running(device):
        lamb_step(RULE, params, grads, states, control_of(device, skip=1.0), copies)
        norms = lamb_moments(RULE, params, grads, states, control_of(device, skip=1.0))
    assert all(map(torch.equal, tensors, before))
    assert not norms.any()
    assert not lamb_moments_reference(RULE, params, grads, states, control_of(device, skip=1.0)).any()


@pytest.mark.parametrize("device", DEVICES)
def test_zero_parameters_move_at_the_plain_rate(device: str) -> None:
    params, grads, states, copies = problem(device)
    for param in params:
        param.zero_()
    with running(device):
        control = control_of(device)
        norms = lamb_moments(RULE, params, grads, states, control)
        lamb_apply(RULE, params, norms, states, control, copies)
    update = RULE.update(torch.zeros(5, device=device), [group[0] for group in states], control.step)
    torch.testing.assert_close(params[0], -0.01 * update, rtol=1e-6, atol=0)


@needs_shim
def test_same_bits_in_any_order() -> None:
    results = []
    for order in (0, 1):
        params, grads, states, copies = problem("cpu")
        assert copies is not None
        with running("cpu", order):
            lamb_step(RULE, params, grads, states, control_of("cpu"), copies)
        results.append([*params, *states[0], *states[1], *copies])
    assert all(map(torch.equal, *results))


@needs_shim
def test_cost_is_what_the_launches_touch() -> None:
    """First pass: parameters read, moments both ways, gradients read. Second: parameters both ways, moments read, copies written."""
    params, grads, states, copies = problem("cpu")
    with running("cpu") as record:
        lamb_step(RULE, params, grads, states, control_of("cpu"), copies)
    assert record is not None
    sizes = []
    for kernel, arguments in record.launches[::2]:
        table, n_chunks = arguments[:2]
        assert isinstance(table, Tensor) and isinstance(n_chunks, int)
        sizes.append(sum(table_sizes(kernel, table, n_chunks)))
    entry = cost("lamb", sum(SIZES), 2, 2)
    assert sizes == [sum(SIZES)] * 2
    assert entry.n_bytes == sum(SIZES) * ((4 + 2 * 8 + 2) + (8 + 2 * 4 + 2))
    assert len(record.launches) == entry.launches == 3


def test_meta_tensors_take_the_launcher() -> None:
    params, grads, states, copies = problem("cpu")
    assert copies is not None
    meta = [[x.to("meta") for x in group] for group in (params, grads, *states, copies)]
    norms = lamb_moments(RULE, meta[0], meta[1], meta[2:4], Control(lr=0.1))
    assert norms.is_meta and norms.shape == (len(SIZES), 2)
    lamb_apply(RULE, meta[0], norms, meta[2:4], Control(lr=0.1), meta[4])


def test_bad_input() -> None:
    one = [torch.ones(4)]
    with pytest.raises(InputError, match="number of states of lamb is 1"):
        lamb_step(RULE, one, one, [one], Control(lr=0.1))
    with pytest.raises(InputError, match=r"shape of norms is \(2, 2\); allowed: \[1, 2\]"):
        lamb_apply(RULE, one, torch.ones(2, 2), [one, one], Control(lr=0.1))
    with pytest.raises(InputError, match=r"dtype of first moments is torch\.bfloat16"):
        lamb_step(RULE, one, one, [[torch.ones(4, dtype=BF16)], one], Control(lr=0.1))
