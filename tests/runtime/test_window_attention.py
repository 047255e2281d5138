"""Windows, sinks and clamped activations (GPT-OSS): the numbers of plain code, the bytes of the forecast, training as in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from estimator.errors import InputError
from estimator.job import Strategy
from runtime import functional
from runtime.clamped import clamped_activate
from runtime.models import build
from runtime.reference import excess
from runtime.session import SessionOptions, run_session
from tests.runtime import tiny
from tests.runtime.experts import DEEPSEEK_V3, GPT_OSS
from tests.runtime.random_jobs import Draw, difference
from tests.runtime.sessions import check, train
from tests.runtime.test_expert_parallel import with_capacity
from tests.runtime.test_experts_memory import WIDE

assert GPT_OSS.experts is not None
WIDER = replace(
    GPT_OSS, **WIDE, sliding_window=20, n_heads=4, n_kv_heads=2, head_dim=32, experts=replace(GPT_OSS.experts, d_ff=200)
)
SHARED = replace(tiny.LLAMA, name="tiny-sinks", vocab_size=64, sliding_window=5, global_every=2, attn_sinks=True)
"""Without biased experts, which tensor-parallel ranks do not share."""


def plainly(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, window: int) -> Tensor:
    """Score by score, with the sink as one more column of the softmax."""
    n, groups = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    distance = torch.arange(n)[:, None] - torch.arange(n)
    scores = scores.masked_fill((distance < 0) | (distance >= (window or n)), float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return (scores.softmax(-1)[..., :n] @ v).transpose(1, 2)


@pytest.mark.parametrize("has_sinks", [True, False])
@pytest.mark.parametrize("window", [0, 1, 4])
def test_results_and_gradients_are_those_of_plain_code(window: int, has_sinks: bool) -> None:
    if not (window or has_sinks):
        return
    generator = torch.Generator().manual_seed(window)
    shapes = [(2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8), *([(4,)] if has_sinks else [])]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    weight = torch.randn(shapes[0], generator=generator)
    q, k, v, sinks = (*inputs, None)[:4]
    out = functional.attention(q, k, v, window=window, sinks=sinks)  # type: ignore[arg-type]
    grads = torch.autograd.grad((out * weight).sum(), inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v, sinks = (*wide, None)[:4]
    wanted = plainly(q, k, v, sinks, window)  # type: ignore[arg-type]
    assert torch.allclose(out.double(), wanted, atol=1e-6)
    for got, want in zip(grads, torch.autograd.grad((wanted * weight).sum(), wide), strict=True):
        assert torch.allclose(got.double(), want, atol=3e-6)


def test_a_window_as_long_as_the_sequence_is_none() -> None:
    q, k, v = torch.randn(3, 2, 9, 4, 8).unbind()
    assert torch.equal(functional.attention(q, k, v, window=9), functional.attention(q, k, v))


def test_the_clamped_activation_is_that_of_plain_code() -> None:
    gate, up = (3 * torch.randn(2, 40, 20, dtype=torch.float64)).unbind()
    gate, up = gate.requires_grad_(), up.requires_grad_()
    gated, linear = gate.clamp(max=2.0), up.clamp(-2.0, 2.0)
    wanted = (linear + 1) * gated * torch.sigmoid(1.702 * gated)
    weight, out = torch.randn_like(wanted), clamped_activate(gate, up, 2.0)
    assert torch.allclose(out, wanted)
    for got, want in zip(
        torch.autograd.grad((out * weight).sum(), (gate, up)), torch.autograd.grad((wanted * weight).sum(), (gate, up)), strict=True
    ):  # fmt: skip
        assert torch.allclose(got, want)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("hopper", {"recompute": "selective"}),
    ("hopper", {"cp": 2, "zero_stage": 2}),
    ("cpu", {"dtype": "fp32"}),
    ("hopper", {}),
    ("hopper", {"recompute": "full"}),
    ("hopper", {"recompute": "core_attention", "dtype": "fp16"}),
    ("hopper", {"recompute": "activation,norms", "kernels_off": ("all",)}),
    ("hopper", {"recompute": "mlp", "zero_stage": 3, "ep": 2}),
    ("hopper", {"pp": 2, "pp_schedule": "zero_bubble"}),
    ("cpu", {"dtype": "bf16", "recompute": "attention"}),
    ("cpu", {"dtype": "bf16", "cp": 2}),
]


@pytest.mark.parametrize(
    ("arch", "fields"), [pytest.param(*c, marks=() if i < 2 else pytest.mark.slow) for i, c in enumerate(CASES)]
)
def test_live_bytes_and_messages_are_the_forecast(arch: str, fields: dict[str, Any]) -> None:
    strategy = Strategy(**fields)
    world = 1 if strategy.model_parallel * strategy.ep == 1 else 4
    job = tiny.job(WIDER, strategy, world=world, n_micro_batches=2, seq_len=64, arch=arch)
    assert not difference(Draw(job, 0))


def test_one_process_trains_as_plain_pytorch_with_another_layout(one_thread: None) -> None:
    strategy = Strategy(dtype="fp32", recompute="selective", offload="optimizer", bucket_bytes=20_000)
    job = tiny.job(GPT_OSS, strategy, arch="cpu")
    parity = run_session(job, "cpu", SessionOptions(steps=6, warmup=0, reference=True)).parity
    assert excess("fp32", parity) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_so_do_two(tmp_path: Path) -> None:
    usual: dict[str, Any] = {"dtype": "fp32", "bucket_bytes": 20_000, "optimizer": "sgd", "grad_clip": 0.1}
    jobs = [
        *(tiny.job(SHARED, Strategy(**usual, **more), world=2, n_micro_batches=2, arch="cpu")
          for more in ({"tp": 2}, {"tp": 2, "sequence_parallel": False, "recompute": "full"}, {"cp": 2}, {"pp": 2}, {"zero_stage": 3})),
        tiny.job(with_capacity(GPT_OSS, 1.25), Strategy(**usual, ep=2), world=2,
                 n_micro_batches=2, arch="cpu"),
    ]  # fmt: skip
    for job, found in zip(jobs, train(jobs, tmp_path), strict=True):
        check(job, found)


def test_what_is_refused() -> None:
    q, k, v = torch.empty(3, 2, 9, 4, 8, device="meta").unbind()
    with pytest.raises(InputError, match="dtype is 'fp32', but the model's attention has a window or sinks"):
        functional.attention(q, k, v, window=3)
    with (
        functional.attending_by("eager"),
        pytest.raises(InputError, match="attention is 'eager', but the model's has a window"),
    ):
        functional.attention(q, k, v, window=3)
    with pytest.raises(InputError, match="has latent attention in a sliding window"):
        build(replace(DEEPSEEK_V3, sliding_window=4))
