"""Optimizer steps on the CPU shim (and a GPU) against fp64, torch.optim and the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from estimator.errors import InputError
from estimator.ops.kernels.optimizer import cost
from runtime.kernels.optimizer import optimizer_step, optimizer_step_reference
from runtime.kernels.registry import switched_off
from runtime.kernels.rules import Adagrad, Adam, Control, Lamb, Lion, Rule, Sgd
from tests.runtime.kernels.checks import DTYPES, assert_close, needs_shim
from tests.runtime.kernels.many import DEVICES, SIZES, clones, randoms, running, table_sizes
from tests.runtime.kernels.shim import guarded, intact

BF16 = torch.bfloat16
RULES = {
    "adamw": Adam(weight_decay=0.1),
    "adam": Adam(weight_decay=0.1, decoupled=False),
    "sgd": Sgd(weight_decay=0.1),
    "nesterov": Sgd(momentum=0.8, weight_decay=0.1, nesterov=True),
    "lion": Lion(weight_decay=0.1),
    "adagrad": Adagrad(weight_decay=0.1),
}
# Each set of types is compiled anew: the quick tests see every rule once, and every dtype.
_TYPES = dict(zip(RULES, [(BF16, BF16), (torch.float16, torch.float16), (torch.float32, None)] * 2, strict=True))
CASES = [
    pytest.param(name, grad, copy, marks=() if (grad, copy) == _TYPES[name] else pytest.mark.slow)
    for name in RULES
    for grad in DTYPES
    for copy in (BF16, torch.float16, None)
]


def scalar(value: float, device: str = "cpu") -> Tensor:
    return torch.tensor([float(value)], device=device)


def states_of(rule: Rule, sizes: Sequence[int], device: str, offsets: Sequence[int] = (0,)) -> list[list[Tensor]]:
    """Positive, as second moments are."""
    groups = [randoms(sizes, device=device, seed=10 + s, offsets=offsets) for s in range(rule.n_states)]
    return [[x.abs_() for x in group] for group in groups]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "grad_type", "copy_type"), CASES)
def test_against_fp64(name: str, grad_type: torch.dtype, copy_type: torch.dtype | None, device: str) -> None:
    rule = RULES[name]
    offsets = ((0, 0, 3), (0, 0, 7), (4, 0, 3), (0, 0, 3))  # element 0 of the third is 3 past an access in every list
    params, grads = (
        randoms(SIZES, dtype, device, seed=i, offsets=offsets[i]) for i, dtype in enumerate((torch.float32, grad_type))
    )
    states = states_of(rule, SIZES, device, offsets[2])
    copies = None if copy_type is None else randoms(SIZES, copy_type, device, seed=3, offsets=offsets[3])
    before, grads_before = clones(params, torch.float64), clones(grads)
    states_before = [clones(group, torch.float64) for group in states]
    control = Control(lr=0.01, step=scalar(3, device), factor=scalar(0.3, device), skip=scalar(0, device))
    with running(device):
        optimizer_step(rule, params, grads, states, control, copies)
    optimizer_step_reference(rule, before, grads, states_before, control)
    assert all(map(torch.equal, grads, grads_before))
    for got, truth in zip(params, before, strict=True):
        assert_close(got, truth, "parameters", 1.0)
    for group, truths in zip(states, states_before, strict=True):
        for got, truth in zip(group, truths, strict=True):
            assert_close(got, truth, "states", 1.0)
    for copy, param in zip(copies or [], params, strict=copies is not None):
        assert torch.equal(copy, param.to(copy.dtype))


def torch_optimizer(name: str, param: Tensor) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW([param], lr=0.01, weight_decay=0.1, foreach=False)
    if name == "adam":
        return torch.optim.Adam([param], lr=0.01, weight_decay=0.1, foreach=False)
    if name == "adagrad":
        return torch.optim.Adagrad([param], lr=0.01, weight_decay=0.1, foreach=False)
    momentum, nesterov = (0.8, True) if name == "nesterov" else (0.9, False)
    return torch.optim.SGD([param], lr=0.01, momentum=momentum, weight_decay=0.1, nesterov=nesterov, foreach=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name in RULES if name != "lion"])
def test_ten_steps_are_torchs(name: str, device: str) -> None:
    """Kernel and reference, in fp32: apart by the last digits only."""
    rule = RULES[name]
    (start,) = randoms((1000,), device=device)
    theirs = start.clone().requires_grad_()
    optimizer = torch_optimizer(name, theirs)
    ours, plain = start.clone(), start.clone()
    states, plain_states = ([[torch.zeros_like(start)] for _ in range(rule.n_states)] for _ in range(2))
    for step in range(1, 11):
        (grad,) = randoms((1000,), device=device, seed=step)
        theirs.grad = grad.clone()
        optimizer.step()
        control = Control(lr=0.01, step=scalar(step, device))
        with running(device):
            optimizer_step(rule, [ours], [grad], states, control)
        optimizer_step_reference(rule, [plain], [grad], plain_states, control)
    for got in (ours, plain):
        torch.testing.assert_close(got, theirs.detach(), rtol=1e-6, atol=5e-7)


def test_lion_by_its_paper() -> None:
    """Algorithm 2 of Chen et al. 2023, by hand: c = 0.9 * 0.5 - 0.1 * 2 = 0.25."""
    param, momentum = torch.tensor([1.0]), torch.tensor([0.5])
    optimizer_step_reference(Lion(weight_decay=0.1), [param], [torch.tensor([-2.0])], [[momentum]], Control(lr=0.01))
    assert param.item() == pytest.approx(1 - 0.01 * (1 + 0.1 * 1), rel=1e-6)
    assert momentum.item() == pytest.approx(0.99 * 0.5 - 0.01 * 2, rel=1e-6)


def test_adamw_by_hand() -> None:
    param, first, second = torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([0.0])
    control = Control(lr=0.1, step=scalar(1), factor=scalar(0.5))
    optimizer_step_reference(Adam(weight_decay=0.2), [param], [torch.tensor([6.0])], [[first], [second]], control)
    assert first.item() == pytest.approx(0.3)
    assert second.item() == pytest.approx(0.009)
    assert param.item() == pytest.approx(2 * (1 - 0.02) - 0.1)  # the first step is lr times the sign


@needs_shim
@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=5),
    offsets=st.lists(st.integers(0, 7), min_size=3, max_size=3),
    seed=st.integers(0, 99),
)
def test_any_size_and_alignment(sizes: list[int], offsets: list[int], seed: int) -> None:
    """Nothing outside a tensor is written, wherever it starts."""
    params, grads = randoms(sizes, seed=seed, offsets=offsets), randoms(sizes, BF16, seed=seed + 1, offsets=offsets[1:])
    states = [[guarded((n,), torch.float32, offsets[s] % 4) for n in sizes] for s in range(2)]
    copies = [guarded((n,), BF16, offsets[2]) for n in sizes]
    for inner, _ in (*states[0], *states[1]):
        inner.fill_(0.25)
    truth, state_truth = clones(params, torch.float64), [[s.double() for s, _ in group] for group in states]
    control = Control(lr=0.01, step=scalar(7))
    with running("cpu"):
        optimizer_step(
            RULES["adamw"], params, grads, [[s for s, _ in group] for group in states], control, [c for c, _ in copies]
        )
    optimizer_step_reference(RULES["adamw"], truth, grads, state_truth, control)
    for i, param in enumerate(params):
        assert_close(param, truth[i], "parameters", 1.0)
        assert torch.equal(copies[i][0], param.to(BF16))
        assert intact(*copies[i])
        for s in range(2):
            assert_close(states[s][i][0], state_truth[s][i], "states", 1.0)
            assert intact(*states[s][i])


@pytest.mark.parametrize("device", DEVICES)
def test_a_thousand_tensors_in_one_launch(device: str) -> None:
    sizes = [i % 37 for i in range(1100)]
    params, grads = randoms(sizes, device=device), randoms(sizes, BF16, device, seed=1)
    states = states_of(RULES["adamw"], sizes, device)
    copies = randoms(sizes, BF16, device)
    truth, state_truth = clones(params, torch.float64), [clones(group, torch.float64) for group in states]
    control = Control(lr=0.01, step=scalar(2, device))
    with running(device) as record:
        optimizer_step(RULES["adamw"], params, grads, states, control, copies)
    optimizer_step_reference(RULES["adamw"], truth, grads, state_truth, control)
    assert_close(torch.cat(params), torch.cat(truth), "parameters", 1.0)
    assert record is None or len(record.launches) == 1


@needs_shim
def test_same_bits_in_any_order() -> None:
    results = []
    for order in (0, 1):
        params, grads, copies = randoms(SIZES), randoms(SIZES, BF16, seed=1), randoms(SIZES, BF16)
        states = states_of(RULES["adamw"], SIZES, "cpu")
        with running("cpu", order):
            optimizer_step(RULES["adamw"], params, grads, states, Control(lr=0.01, step=scalar(2)), copies)
        results.append([*params, *copies, *states[0], *states[1]])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flag", [1.0, math.nan])
def test_a_skipped_step_writes_nothing(flag: float, device: str) -> None:
    sizes = (300, 7)
    params, grads, copies = randoms(sizes, device=device), randoms(sizes, BF16, device), randoms(sizes, BF16, device)
    grads[1][3] = math.nan
    states = states_of(RULES["adamw"], sizes, device)
    tensors = [*params, *copies, *states[0], *states[1]]
    before = clones(tensors)
    control = Control(lr=0.01, step=scalar(2, device), skip=scalar(flag, device))
    with running(device):
        optimizer_step(RULES["adamw"], params, grads, states, control, copies)
    assert all(map(torch.equal, tensors, before))
    optimizer_step_reference(RULES["adamw"], params, grads, states, control, copies)
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("device", DEVICES)
def test_the_learning_rate_may_be_on_the_device(device: str) -> None:
    results = []
    for lr in (0.125, scalar(0.125, device)):
        params, grads, copies = (randoms((300,), t, device, seed=5) for t in (torch.float32, BF16, BF16))
        with running(device):
            control = Control(lr=lr, step=scalar(2, device))
            optimizer_step(RULES["adamw"], params, grads, states_of(RULES["adamw"], (300,), device), control, copies)
        results.append(params[0])
    assert torch.equal(*results)


@needs_shim
def test_bias_correction_keeps_its_digits() -> None:
    """After one step from zero moments, Adam moves by lr whatever the gradient: 1 - 0.999 in fp32 would be off by 1e-5."""
    param, grad = torch.zeros(64), torch.full((64,), 0.001)
    with running("cpu"):
        states = [[torch.zeros(64)], [torch.zeros(64)]]
        optimizer_step(Adam(eps=0.0, weight_decay=0.0), [param], [grad], states, Control(lr=1.0, step=scalar(1)))
    torch.testing.assert_close(param, torch.full((64,), -1.0), rtol=5e-7, atol=0)


@needs_shim
@pytest.mark.parametrize("name", RULES)
def test_cost_is_what_the_launch_touches(name: str) -> None:
    rule = RULES[name]
    grad_type, copy_type = _TYPES[name]
    params, grads = randoms(SIZES), randoms(SIZES, grad_type)
    copies = None if copy_type is None else randoms(SIZES, copy_type)
    with running("cpu") as record:
        optimizer_step(rule, params, grads, states_of(rule, SIZES, "cpu"), Control(lr=0.01, step=scalar(1)), copies)
    assert record is not None
    ((kernel, arguments),) = record.launches
    table, n_chunks = arguments[:2]
    assert isinstance(table, Tensor) and isinstance(n_chunks, int)
    numel = sum(table_sizes(kernel, table, n_chunks))
    entry = cost(rule.name, numel, grads[0].itemsize, 0 if copies is None else 2)
    read_and_written = [4] * (1 + rule.n_states)
    once = [grads[0].itemsize] + ([] if copies is None else [2])
    assert dict(kernel.defines)["LISTS"] == len(read_and_written) + len(once)
    assert entry.n_bytes == numel * (2 * sum(read_and_written) + sum(once))
    assert (numel, entry.launches) == (sum(SIZES), 1)
    assert table.nbytes < entry.n_bytes / 500  # what the entry leaves out


def test_adamw_with_bf16_moves_28_bytes_for_an_element() -> None:
    entry = cost("adamw", 1000, 2, 2)
    assert (entry.n_bytes, entry.flops, entry.launches) == (28_000, 15_000, 1)


@needs_shim
def test_no_tensors_and_switched_off() -> None:
    with running("cpu") as record:
        optimizer_step(Adam(), [], [], [[], []], Control(lr=0.1))
        params, states = randoms((5,)), [randoms((5,)), [torch.ones(5)]]
        with switched_off("adam"):
            optimizer_step(Adam(), params, randoms((5,), seed=1), states, Control(lr=0.1))
    assert record is not None and record.launches == []
    assert not torch.equal(params[0], randoms((5,))[0])


def test_meta_tensors_take_the_launcher() -> None:
    meta = [
        [x.to("meta") for x in randoms(SIZES, dtype)] for dtype in (torch.float32, BF16, torch.float32, torch.float32)
    ]
    optimizer_step(Adam(), meta[0], meta[1], meta[2:], Control(lr=0.1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": [[torch.ones(4)]]}, "number of states of adam is 1; allowed: 2"),
        ({"grads": [torch.ones(5)]}, r"size of gradients\[0\] is 5; allowed: 4"),
        ({"grads": [torch.ones(4, dtype=torch.int32)]}, "dtype of gradients is torch.int32"),
        ({"copies": [torch.ones(3)]}, r"size of copies\[0\]"),
        ({"params": [torch.ones(4, dtype=BF16)]}, "dtype of parameters is torch.bfloat16"),
        ({"rule": Lamb()}, "lamb_step takes LAMB"),
    ],
)
def test_bad_lists(change: dict[str, object], message: str) -> None:
    given_: dict[str, object] = {
        "rule": Adam(), "params": [torch.ones(4)], "grads": [torch.ones(4)],
        "states": [[torch.ones(4)], [torch.ones(4)]], "control": Control(lr=0.1), "copies": None,
    }  # fmt: skip
    with pytest.raises(InputError, match=message):
        optimizer_step(**(given_ | change))  # type: ignore[arg-type]


def test_bad_numbers() -> None:
    with pytest.raises(InputError, match="lr is -1"):
        Control(lr=-1.0)
    with pytest.raises(InputError, match=r"factor is .*fp32 of one element"):
        Control(lr=0.1, factor=torch.ones(2))
    with pytest.raises(InputError, match="decay rates"):
        Adam(betas=(0.9, 1.0))
    with pytest.raises(InputError, match="eps, weight_decay"):
        Adagrad(eps=-1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_in_a_cuda_graph_on_a_side_stream() -> None:
    """Three replays under a changing learning rate and a skipped step are three calls."""
    rule = RULES["adamw"]

    def fresh() -> tuple[list[Tensor], list[Tensor], list[list[Tensor]], Control]:
        control = Control(lr=scalar(0.1, "cuda"), step=scalar(1, "cuda"), skip=scalar(0, "cuda"))
        zeros = [[torch.zeros(n, device="cuda") for n in SIZES] for _ in range(2)]
        return randoms(SIZES, device="cuda"), randoms(SIZES, device="cuda", seed=1), zeros, control

    def drive(params: list[Tensor], control: Control, step: object) -> list[Tensor]:
        for number, (lr, skip) in enumerate(((0.1, 0.0), (0.05, 1.0), (0.02, 0.0)), 1):
            assert isinstance(control.lr, Tensor) and control.step is not None and control.skip is not None
            control.lr.fill_(lr)
            control.step.fill_(number)
            control.skip.fill_(skip)
            step()  # type: ignore[operator]
        torch.cuda.synchronize()
        return params

    params, grads, states, control = fresh()
    expected = drive(params, control, lambda: optimizer_step(rule, params, grads, states, control))

    captured, captured_grads, captured_states, captured_control = fresh()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured_control.skip.fill_(1)  # type: ignore[union-attr]
        optimizer_step(rule, captured, captured_grads, captured_states, captured_control)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            optimizer_step(rule, captured, captured_grads, captured_states, captured_control)
    torch.cuda.synchronize()
    got = drive(captured, captured_control, graph.replay)
    assert all(map(torch.equal, got, expected))
