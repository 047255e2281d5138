"""The kernels on a GPU against fp64: dtypes, odd sizes, unaligned views, streams, graphs, determinism, huge tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from runtime.kernels import loader
from runtime.kernels.activation import ACTIVATIONS, activate, gated_activate
from runtime.kernels.dropout import dropout_residual
from runtime.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from runtime.kernels.rotary import rotate
from tests.runtime.kernels.checks import DTYPES, assert_close, at_offset, gradients, wide

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

EPS = 1e-5
GPU = "cuda"


class Case(NamedTuple):
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    """Of its tensors."""


def cases() -> dict[str, Case]:
    found = {}
    for rows, width in ((1, 1), (37, 40), (64, 128), (300, 1001), (129, 4096), (5, 8192), (7, 16384), (3, 16383)):
        two, one = (rows, width), (width,)
        found[f"rms_norm_{rows}x{width}"] = Case(lambda x, w: rms_norm(x, w, EPS), (two, one))
        found[f"layer_norm_{rows}x{width}"] = Case(lambda x, w, b: layer_norm(x, w, b, EPS), (two, one, one))
    for name in ACTIVATIONS:
        found[f"gated_{name}"] = Case(lambda g, u, name=name: gated_activate(g, u, name), ((77, 1001), (77, 1001)))
        found[f"plain_{name}"] = Case(lambda x, name=name: activate(x, name), ((77, 1001),))
        for rows, width in ((5000, 264), (33, 1001)):
            found[f"biased_{name}_{width}"] = Case(
                lambda x, b, name=name: activate(x, name, b), ((rows, width), (width,))
            )
    for interleaved in (False, True):
        for heads, head_dim, half in ((32, 128, 64), (8, 96, 32), (3, 10, 3)):
            found[f"rotary_{interleaved}_{head_dim}"] = Case(
                lambda x, half=half, interleaved=interleaved: rotate(
                    x, *tables(x, half), interleaved=interleaved, in_place=False
                ),
                ((2, 65, heads, head_dim),),
            )
    return found


def tables(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(x.shape[1]).float(), 10_000 ** -(torch.arange(half) / half))
    return angles.cos().to(x.device), angles.sin().to(x.device)


CASES = cases()


def samples(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, offset: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(at_offset(torch.randn(*s, generator=generator).to(GPU, dtype), offset) for s in shapes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_against_fp64(name: str, offset: int, dtype: torch.dtype) -> None:
    call, shapes = CASES[name]
    inputs = samples(shapes, dtype, offset)
    incoming = samples((shapes[0],), dtype, offset)
    outputs, grads = gradients(call, inputs, incoming)
    cpu = tuple(t.cpu() for t in inputs)
    truths, grad_truths = gradients(call, wide(*cpu), wide(*(t.cpu() for t in incoming)))
    for what, got, truth in zip(
        ("y", "x", "second", "third"), (*outputs, *grads), (*truths, *grad_truths), strict=False
    ):
        n_summed = inputs[0].numel() // got.numel()
        scale = truth.abs().amax() * (1 if n_summed == 1 else n_summed**0.5)
        assert_close(got.cpu(), truth, f"{name}: {what}", scale + 1.0)


@pytest.mark.parametrize("rms", [True, False])
def test_dropout_is_that_of_the_cpu(rms: bool) -> None:
    x, residual, weight, bias = samples(((50, 1024), (50, 1024), (1024,), (1024,)), torch.bfloat16)
    seed = torch.tensor([987654321])

    def call(*t: Tensor) -> tuple[Tensor, ...]:
        key = seed.to(t[0].device)
        if rms:
            return (*add_rms_norm(*t[:3], EPS, 0.2, key), dropout_residual(t[0], t[1], 0.2, key))
        return (*add_layer_norm(*t, EPS, 0.2, key), dropout_residual(t[0], t[1], 0.2, key))

    on_gpu, on_cpu = call(x, residual, weight, bias), call(*(t.cpu() for t in (x, residual, weight, bias)))
    h = on_cpu[1]
    assert torch.equal(on_gpu[1].cpu(), h) and torch.equal(on_gpu[2].cpu(), on_cpu[2])
    params = wide(weight.cpu(), bias.cpu())
    truth = rms_norm(h.double(), params[0], EPS) if rms else layer_norm(h.double(), *params, EPS)
    assert_close(on_gpu[0].cpu(), truth, "y", 4.0)


@pytest.mark.parametrize("name", ["layer_norm_300x1001", "layer_norm_7x16384", "biased_gelu_264", "rotary_True_96"])
def test_same_bits_every_time(name: str) -> None:
    call, shapes = CASES[name]
    inputs, incoming = samples(shapes, torch.bfloat16), samples((shapes[0],), torch.bfloat16)
    first = gradients(call, inputs, incoming)
    for _ in range(3):
        again = gradients(call, inputs, incoming)
        assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))


def test_runs_on_the_current_stream() -> None:
    """On a side stream behind long work: the result is right only if the launch waited for it."""
    x = torch.zeros(4096, 4096, device=GPU, dtype=torch.bfloat16)
    ones = torch.ones(4096, device=GPU, dtype=torch.bfloat16)
    rms_norm(x, ones, EPS)  # compiled before the race starts
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        x.fill_(3.0)
        y = rms_norm(x, ones, EPS)
    torch.cuda.current_stream().wait_stream(side)
    assert bool((y == 1).all())


def test_captured_in_a_graph() -> None:
    x, weight = samples(((512, 1024), (1024,)), torch.bfloat16)
    residual = torch.randn_like(x)

    def step() -> tuple[Tensor, Tensor]:
        leaf = x.detach().requires_grad_()
        y, _ = add_rms_norm(leaf, residual, weight, EPS, 0.5)
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, grad = step()
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append((y.clone(), grad.clone()))
    assert not torch.equal(seen[0][0], seen[1][0]), "each replay draws its own dropout"
    dropped = grad == 0
    assert 0.4 < float(dropped.float().mean()) < 0.6
    x.fill_(0.0)
    graph.replay()
    truth, _ = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(y, truth)


def test_cupy_allocates_nothing() -> None:
    x, weight = samples(((512, 1024), (1024,)), torch.bfloat16)
    gradients(lambda a, w: rms_norm(a, w, EPS), (x, weight), (x,))
    assert loader.cupy().get_default_memory_pool().total_bytes() == 0


def _needs_free(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * 10**9:
        pytest.skip(f"needs {gigabytes} GB of free GPU memory")


def test_more_than_2_31_elements() -> None:
    _needs_free(20)
    n = 2**31 + 4096 + 9
    x = torch.zeros(n, device=GPU, dtype=torch.bfloat16)
    ends = [slice(0, 64), slice(2**31 - 32, 2**31 + 32), slice(n - 64, n)]
    for part in ends:
        x[part] = torch.randn(64, device=GPU)
    y = activate(x, "silu")
    for part in ends:
        assert_close(y[part].cpu(), activate(x[part].cpu().double(), "silu"), str(part), 1.0)
    seed = torch.tensor([5], device=GPU)
    y = dropout_residual(torch.ones_like(x), x, 0.5, seed)
    assert 0.45 < float((y[n - 4096 : n - 64] == 0).float().mean()) < 0.55


def test_norm_of_more_than_2_31_elements() -> None:
    _needs_free(30)
    rows, width = 2**31 // 4096 + 3, 4096
    x = torch.zeros(rows, width, device=GPU, dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, width, device=GPU)
    weight = torch.randn(width, device=GPU, dtype=torch.bfloat16)
    (y,), (grad_x, grad_weight) = gradients(lambda a, w: rms_norm(a, w, EPS), (x, weight), (x,))
    few = x[-3:].cpu().double()
    (truth,), grads = gradients(lambda a, w: rms_norm(a, w, EPS), (few, weight.cpu().double()), (few,))
    assert_close(y[-3:].cpu(), truth, "y", 1.0)
    assert_close(grad_x[-3:].cpu(), grads[0], "grad_x", float(grads[0].abs().amax()))
    assert_close(grad_weight.cpu(), grads[1], "grad_weight", float(grads[1].abs().amax()))
