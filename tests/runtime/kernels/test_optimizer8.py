"""Adam with 8-bit moments: the map, and the kernel against its plain-torch form and against fp32 moments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.optimizer import cost
from runtime.kernels.blockwise8 import Blockwise8, decode, encode, map_values, zeros8
from runtime.kernels.optimizer import optimizer_step, optimizer_step_reference
from runtime.kernels.rules import Adam, Control, Sgd
from tests.runtime.kernels.checks import needs_shim
from tests.runtime.kernels.many import DEVICES, SIZES, clones, randoms, running

BF16 = torch.bfloat16


def paper_map(signed: bool) -> Tensor:
    """As the paper's code builds it: middles of equal parts of [0.1, 1] in seven decades, 0 and 1; in fp64."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)).tolist()
        values += middles + [-m for m in middles] * signed
    return torch.tensor(sorted(values), dtype=torch.float64)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_papers(signed: bool) -> None:
    torch.testing.assert_close(map_values(signed).double(), paper_map(signed), rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_values_of_the_map_keep_their_code(signed: bool) -> None:
    block = map_values(signed)[None] * 3.5
    coded = encode(block, signed=signed)
    assert coded.absmax.tolist() == [3.5]
    assert coded.codes.flatten().tolist() == list(range(256))
    torch.testing.assert_close(decode(coded, signed=signed), block, rtol=1e-7, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(100_000, generator=generator) * 10.0 ** torch.randint(-9, 1, (100_000,), generator=generator)
    x = x * (torch.randint(0, 2, x.shape, generator=generator) * 2 - 1) if signed else x
    coded = encode(x, signed=signed)
    scale = coded.absmax.repeat_interleave(256)[: x.numel()].double()
    unit, values = x.double() / scale, map_values(signed).double()
    best = (unit[:, None] - values[None]).abs().min(1).values
    got = (unit - values[coded.codes.long()]).abs()
    lifted = (unit > 0) & (coded.codes == 1) if not signed else torch.zeros_like(unit, dtype=torch.bool)
    assert ((got <= best + 1e-6 * unit.abs()) | lifted).all()
    assert signed or ((coded.codes == 0) == (unit == 0)).all()  # a positive second moment never becomes zero


def test_odd_blocks() -> None:
    x = torch.cat((torch.zeros(256), torch.full((256,), 1e-40), torch.full((3,), -2.0)))
    coded = encode(x, signed=True)
    assert coded.absmax.shape == (3,)
    assert decode(coded, signed=True).tolist() == pytest.approx([0.0] * 512 + [-2 * (1 - 0.45 / 64)] * 3, rel=1e-6)
    assert encode(torch.zeros(0), signed=True).absmax.shape == (0,)


def moments8(sizes: tuple[int, ...], device: str, offset: int = 0) -> list[list[Blockwise8]]:
    """Random ones, as a run leaves them, whose codes start ``offset`` past an access."""
    groups = []
    for signed in (True, False):
        values = [x * 0.1 if signed else x.square() for x in randoms(sizes, seed=20 + signed)]
        coded = [encode(x, signed=signed) for x in values]
        codes = [torch.empty(c.codes.numel() + offset, dtype=torch.uint8, device=device)[offset:] for c in coded]
        for target, source in zip(codes, coded, strict=True):
            target.copy_(source.codes)
        groups.append([Blockwise8(c, source.absmax.to(device)) for c, source in zip(codes, coded, strict=True)])
    return groups


def clones8(groups: list[list[Blockwise8]]) -> list[list[Blockwise8]]:
    return [[Blockwise8(*(t.clone() for t in x)) for x in group] for group in groups]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0, 1])
def test_against_the_reference(offset: int, device: str) -> None:
    """Codes agree but for numbers at a border; where one differs, the next step moves that parameter by up to lr otherwise."""
    params, grads = randoms(SIZES, device=device, offsets=(0, 1)), randoms(SIZES, BF16, device, seed=1)
    copies, states = randoms(SIZES, BF16, device), moments8(SIZES, device, offset)
    truth, state_truth = clones(params), clones8(states)
    for step in (5, 6):
        control = Control(lr=0.01, step=torch.tensor([float(step)], device=device))
        with running(device):
            optimizer_step(Adam(), params, grads, states, control, copies)
        optimizer_step_reference(Adam(), truth, grads, state_truth, control)
    for i, param in enumerate(params):
        torch.testing.assert_close(param, truth[i], rtol=1e-6, atol=1e-6 if device == "cpu" else 0.02)
        assert torch.equal(copies[i], param.to(BF16))
        for group, group_truth in zip(states, state_truth, strict=True):
            rtol = 1e-6 if device == "cpu" else 0.01
            torch.testing.assert_close(group[i].absmax, group_truth[i].absmax, rtol=rtol, atol=0)
            apart = (group[i].codes.int() - group_truth[i].codes.int()).abs()
            assert apart.sum() <= 1 + apart.numel() // 2000
            assert apart.numel() == 0 or apart.max() <= 1


@needs_shim
@settings(max_examples=20, deadline=None)
@given(numel=st.integers(0, 9000), offset=st.integers(0, 5), exponent=st.integers(-12, 6), seed=st.integers(0, 99))
def test_any_size_and_alignment(numel: int, offset: int, exponent: int, seed: int) -> None:
    param, grad = randoms((numel,), seed=seed, offsets=(offset,)), randoms((numel,), BF16, seed=seed + 1)
    grad[0].mul_(10.0**exponent)
    around = [torch.full((numel + 40,), 77, dtype=torch.uint8) for _ in range(2)]
    states = [
        [Blockwise8(a[16 + offset : 16 + offset + numel].fill_(0), torch.zeros(-(-numel // 256)))] for a in around
    ]
    truth, state_truth = clones(param), clones8(states)
    copies = randoms((numel,), BF16)
    control = Control(lr=0.01, step=torch.tensor([1.0]))
    with running("cpu"):
        optimizer_step(Adam(), param, grad, states, control, copies)
    optimizer_step_reference(Adam(), truth, grad, state_truth, control)
    torch.testing.assert_close(param, truth, rtol=1e-6, atol=1e-6)
    for whole, group, group_truth in zip(around, states, state_truth, strict=True):
        assert (whole[: 16 + offset] == 77).all() and (whole[16 + offset + numel :] == 77).all()
        torch.testing.assert_close(group[0].absmax, group_truth[0].absmax, rtol=1e-6, atol=0)
        assert (group[0].codes.int() - group_truth[0].codes.int()).abs().sum() <= 1


@needs_shim
def test_same_bits_in_any_order() -> None:
    results = []
    for order in (0, 1):
        params, grads, copies = randoms(SIZES), randoms(SIZES, BF16, seed=1), randoms(SIZES, BF16)
        states = moments8(SIZES, "cpu")
        with running("cpu", order):
            optimizer_step(Adam(), params, grads, states, Control(lr=0.01, step=torch.tensor([2.0])), copies)
        results.append([*params, *copies, *(t for group in states for x in group for t in x)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("device", DEVICES)
def test_a_skipped_step_writes_nothing(device: str) -> None:
    params, grads, copies = (randoms((700,), dtype, device) for dtype in (torch.float32, BF16, BF16))
    grads[0][5] = math.inf
    states = moments8((700,), device)
    tensors = [*params, *copies, *(t for group in states for x in group for t in x)]
    before = clones(tensors)
    with running(device):
        control = Control(lr=0.01, skip=torch.ones(1, device=device))
        optimizer_step(Adam(), params, grads, states, control, copies)
    assert all(map(torch.equal, tensors, before))


def test_trains_as_with_fp32_moments() -> None:
    """Least squares in 300 unknowns of scales from 1 to 10, 100 steps: to a fortieth of the loss, within a tenth of fp32's."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 300, generator=generator) * torch.logspace(0, 1, 300)
    target = a @ torch.randn(300, generator=generator)
    losses = []
    for eight_bit in (False, True):
        x = torch.zeros(300)
        states = [[zeros8(x)], [zeros8(x)]] if eight_bit else [[torch.zeros(300)], [torch.zeros(300)]]
        for step in range(1, 101):
            error = a @ x - target
            control = Control(lr=0.05 * (1 - step / 101), step=torch.tensor([float(step)]))
            optimizer_step(Adam(weight_decay=0.0), [x], [a.T @ error], states, control)
        losses.append((a @ x - target).square().mean().item() / target.square().mean().item())
    assert losses[0] < 1 / 40
    assert losses[1] < 1.1 * losses[0]


def test_cost() -> None:
    """Master 8, gradient 2, copy 2, codes 4, and 16 bytes of magnitudes for each 256 elements."""
    entry = cost("adamw", 512, 2, 2, eight_bit=True)
    assert entry.n_bytes == 16 * 512 + 2 * 2 * 8
    states = moments8((512,), "cpu")
    assert entry.n_bytes == 512 * (8 + 2 + 2) + 2 * sum(t.nbytes for group in states for x in group for t in x)


def test_bad_states() -> None:
    param = torch.ones(300)
    eight = zeros8(param)
    with pytest.raises(InputError, match="states of adam is 'Blockwise8'"):
        optimizer_step(Adam(), [param], [param], [[eight], [param]], Control(lr=0.1))
    with pytest.raises(InputError, match="states of sgd"):
        optimizer_step(Sgd(), [param], [param], [[eight]], Control(lr=0.1))
    with pytest.raises(InputError, match=r"number of magnitudes of states\[0\] is 1; allowed: 2"):
        bad = Blockwise8(eight.codes, torch.zeros(1))
        optimizer_step(Adam(), [param], [param], [[bad], [eight]], Control(lr=0.1))
    with pytest.raises(InputError, match=r"dtypes of states\[1\]"):
        wrong = Blockwise8(eight.codes.int(), eight.absmax)
        optimizer_step(Adam(), [param], [param], [[eight], [wrong]], Control(lr=0.1))
