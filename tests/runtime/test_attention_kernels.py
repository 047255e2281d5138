"""Attention by other kernels than flash: live bytes as forecast, numbers as flash attention's and as plain PyTorch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.predict import lay_out, memory_of
from runtime import functional, initialize
from runtime.models import Decoder
from runtime.reference import excess
from runtime.session import SessionOptions, run_session
from tests.runtime import encoders, experts, tiny
from tests.runtime.memory import MODELS, check, compare, metered

ON_GPU = [
    ("eager", "llama", "bf16", "none"),
    ("eager", "llama", "fp32", "core_attention"),
    ("eager", "qwen3", "bf16", "core_attention"),
    ("eager", "gpt", "bf16", "norms,core_attention"),
    ("eager", "gemma2", "fp16", "selective"),
    ("eager", "neox", "bf16", "full"),
    ("math", "llama", "bf16", "none"),
    ("math", "gpt", "fp32", "none"),
    ("math", "qwen3", "bf16", "selective"),
    ("efficient", "llama", "bf16", "none"),
    ("efficient", "gpt", "fp16", "core_attention"),
    ("efficient", "qwen3", "bf16", "selective"),
    ("flash", "llama", "bf16", "core_attention"),
    ("flash", "gpt", "bf16", "core_attention,mlp"),
]  # fmt: skip


def case(kernel: str, model: str, dtype: str, recompute: str, *, arch: str = "hopper", **more: int) -> Job:
    strategy = Strategy(attention=kernel, dtype=dtype, recompute=recompute, zero_stage=3 if "world" in more else 0)  # type: ignore[arg-type]
    return tiny.job(MODELS[model], strategy, seq_len=64, arch=arch, **more)


@pytest.mark.parametrize("args", ON_GPU, ids="-".join)
def test_live_bytes_on_a_gpu(args: tuple[str, str, str, str]) -> None:
    check(case(*args, micro_batch=4))
    check(case(*args, micro_batch=1, world=4))


@pytest.mark.parametrize("args", [*ON_GPU[:2], ON_GPU[5], ON_GPU[6], ON_GPU[7]], ids="-".join)
def test_live_bytes_on_a_cpu(args: tuple[str, str, str, str]) -> None:
    job = case(*args, micro_batch=4, arch="cpu")
    compare(metered(job, "fake-cpu"), memory_of(lay_out(job)))


@pytest.mark.parametrize("kernel", ["eager", "efficient"])
def test_live_bytes_of_ranks_that_share_heads_or_tokens(kernel: str) -> None:
    for axes in ({"tp": 2}, {"cp": 2}):
        strategy = Strategy(attention=kernel, recompute="core_attention", zero_stage=1, **axes)  # type: ignore[arg-type]
        check(tiny.job(MODELS["llama"], strategy, world=4, micro_batch=8, seq_len=64))


@pytest.mark.parametrize("kernel", ["eager", "math"])
def test_live_bytes_of_latent_attention_and_of_encoders(kernel: str) -> None:
    check(tiny.job(experts.DEEPSEEK_V2, Strategy(attention=kernel)))  # type: ignore[arg-type]
    check(tiny.job(encoders.BERT, Strategy(attention=kernel)))  # type: ignore[arg-type]


def test_scores_are_what_recomputing_the_core_saves() -> None:
    """Per block and pair: fp32 weights (4 B) and their bf16 copy (2 B). For it queries, keys and values wait in place of copies of them
    in which heads come first, of which key and value heads are twice as many."""
    kept = [
        memory_of(lay_out(case("eager", "llama", "bf16", recompute, micro_batch=4))).category_peak_bytes["activations"]
        for recompute in ("none", "core_attention")
    ]
    pairs, tokens = 4 * 4 * 64 * 64, 4 * 64
    scores, copies = 6 * pairs, (128 + 2 * 128) * tokens * 2 - (128 + 2 * 64) * tokens * 2
    saved = 3 * (scores + copies)
    held_again = scores + copies + 3 * 128 * tokens * 2  # the last block's, when backward begins: at most this
    assert saved - held_again <= kept[0] - kept[1] <= saved


def inputs(causal: bool) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    heads = (4, 2, 2) if causal else (4, 4, 4)
    return tuple(torch.randn(2, 16, h, 8, generator=generator, dtype=torch.float64).requires_grad_() for h in heads)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", ["eager", "math"])
def test_results_and_gradients(kernel: str, causal: bool) -> None:
    """Against torch's own attention, in fp64 up to eager's fp32 softmax."""
    q, k, v = inputs(causal)
    with functional.attending_by(kernel):  # type: ignore[arg-type]
        out = functional.attention(q, k, v, causal=causal)
    want_q, want_k, want_v = inputs(causal)
    want = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (want_q, want_k, want_v)), is_causal=causal, enable_gqa=True
    ).transpose(1, 2)
    assert out.shape == q.shape and torch.allclose(out, want, atol=1e-6)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    for got, wanted in ((q, want_q), (k, want_k), (v, want_v)):
        assert torch.allclose(got.grad, wanted.grad, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", ["eager", "math"])
@pytest.mark.parametrize("recompute", ["none", "core_attention"])
def test_training_as_plain_pytorch_does(kernel: str, recompute: str, one_thread: None) -> None:
    for spec, dtype in ((tiny.LLAMA, "fp32"), (tiny.GPT, "bf16")):
        strategy = Strategy(attention=kernel, recompute=recompute, dtype=dtype)  # type: ignore[arg-type]
        job = tiny.job(spec, strategy, arch="cpu")
        parity = run_session(job, "cpu", SessionOptions(steps=8, warmup=0, reference=True)).parity
        assert excess(dtype, parity) is None


def test_what_cannot_be() -> None:
    plain = tiny.job(tiny.LLAMA, Strategy(), arch="cpu")
    with pytest.raises(InputError, match="attention is 'efficient', a kernel that a CPU has not; allowed: flash, math"):
        replace(plain, strategy=Strategy(attention="efficient"))
    with pytest.raises(InputError, match="attention is 'eager', but tiny-t5 adds a number to every score"):
        tiny.job(encoders.T5, Strategy(attention="eager"))
    with pytest.raises(InputError, match="attention is 'math' with cp_kind 'ring'"):
        tiny.job(tiny.LLAMA, Strategy(attention="math", cp=2, cp_kind="ring"), world=2)
    with pytest.raises(InputError, match="attention is 'eager', but Sequential attends in its own way; allowed: flash"):
        initialize(model=nn.Sequential(nn.Linear(2, 2)), strategy=Strategy(attention="eager"))
    with pytest.raises(InputError, match="a step of Megatron-LM is only forecast, allowed here: zerocast"):
        initialize(model=Decoder(tiny.LLAMA), strategy=Strategy(framework="megatron"))
    with pytest.raises(
        InputError, match="matmul_dtype is 'fp8', which is only forecast; this runtime multiplies in dtype"
    ):
        initialize(model=Decoder(tiny.LLAMA), strategy=Strategy(matmul_dtype="fp8"))
