"""Adapters: live bytes equal the forecast's, training equals plain PyTorch's, a layer equals PEFT's."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from estimator.job import Job, Strategy
from estimator.job.lora import Lora
from runtime.models import build
from runtime.models.lora import LoraLinear
from runtime.session import SessionOptions, run_session
from tests.runtime import sessions, tiny
from tests.runtime.memory import MODELS, check

TARGETS = (("all",), ("q", "v"), ("mlp",), ("attention",), ("k",), ("out", "up"), ("down",))
RECOMPUTES = ("none", "full", "selective", "norms,activation", "attention", "mlp", "core_attention", "attention,norms")


def case(number: int) -> Job:
    draw = random.Random(number).choice
    recompute = RECOMPUTES[number % len(RECOMPUTES)]
    lora = Lora(
        rank=draw((2, 4, 8)), alpha=draw((0, 16)), targets=TARGETS[number % len(TARGETS)], dropout=draw((0, 0, 0.1))
    )
    strategy = Strategy(
        zero_stage=number // 2 % 4, recompute=recompute, dtype=draw(("bf16", "fp32", "fp16")),
        offload=draw(("none", "none", "optimizer", "optimizer,param")), bucket_bytes=draw((300_000, 20_000)),
        kernels_off=draw(((), ("all",), ("linear_cross_entropy",), ("rms_norm", "layer_norm"))),
        prefetch_depth=draw((0, 1, 2)), recompute_every=draw((1, 1, 2)), grad_dtype=draw(("model", "fp32")),
        attention=draw(("flash", "flash", "eager", "math")), persistent_numel=draw((0, 0, 600)),
    )  # fmt: skip
    spec = replace(MODELS[draw(list(MODELS))], lora=lora)
    return tiny.job(
        spec, strategy, world=draw((1, 2, 8, 64)), n_micro_batches=draw((1, 3)), micro_batch=draw((1, 4)), seq_len=64
    )


@pytest.mark.parametrize("number", range(8))
def test_live_bytes(number: int) -> None:
    check(case(number))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8, 200))
def test_live_bytes_everywhere(number: int) -> None:
    check(case(number))


OTHER_WAYS = (
    {"cp": 2, "zero_stage": 2}, {"cp": 2, "cp_kind": "ring", "zero_stage": 3}, {"zero_stage": 3, "shard_size": 2},
    {"zero_stage": 3, "secondary_shard": 2, "quantized_weights": True}, {"zero_stage": 1, "grad_compression": "one_bit"},
    {"sync": "parameter_server", "n_servers": 2}, {"zero_stage": 2, "optimizer": "adamw8bit"},
    {"zero_stage": 2, "offload": "optimizer", "delayed_update": True},
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fields", OTHER_WAYS, ids=str)
def test_live_bytes_of_other_strategies(fields: dict) -> None:
    for targets in (("all",), ("mlp",)):
        spec = replace(MODELS["llama"], lora=Lora(rank=4, alpha=8, targets=targets))
        check(tiny.job(spec, Strategy(bucket_bytes=50_000, **fields), world=8, n_micro_batches=3, seq_len=64))


def adapted(model: int, way: dict, targets: tuple[str, ...], world: int) -> Job:
    lora = Lora(rank=4, alpha=8, targets=targets, init=("kaiming", "gaussian")[model % 2])  # type: ignore[arg-type]
    spec = replace((tiny.LLAMA, tiny.GPT, tiny.QWEN3)[model], lora=lora)
    return tiny.job(spec, Strategy(**way), world=world, n_micro_batches=2, arch="cpu")


@pytest.mark.parametrize(("model", "stage"), [(0, 3), (1, 0)])
def test_trains_as_plain_pytorch_alone(model: int, stage: int) -> None:
    job = adapted(model, {"dtype": "fp32", "zero_stage": stage}, (("all",), ("q", "v"))[model], 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        parity = run_session(job, "cpu", SessionOptions(steps=3, warmup=0, reference=True)).parity
    finally:
        torch.set_num_threads(threads)
    assert parity == {"loss": 0.0, "params": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_trains_as_plain_pytorch(world: int, tmp_path: Path) -> None:
    """Six ways and a shared sequence, 20 steps each."""
    ways = [*sessions.WAYS, {"cp": 2, "zero_stage": 2, "dtype": "fp32"}]
    jobs = [adapted(1 if "cp" in way else i % 3, way, TARGETS[i % 4], world) for i, way in enumerate(ways)]
    sessions.train_and_check(jobs, tmp_path)


def test_only_adapters_move() -> None:
    spec = replace(tiny.LLAMA, lora=Lora(rank=2, targets=("q",)))
    model, plain = build(spec), build(tiny.LLAMA)
    for one in (model, plain):
        one.reset_parameters(3)
    start = dict(plain.named_parameters())
    for name, param in model.named_parameters():
        assert param.requires_grad == (".lora_" in name), name
        assert ".lora_" in name or torch.equal(param, start[name]), name  # adapters change no other initial value
    batch = torch.randint(61, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(*batch), plain(*batch))  # B begins at zero
    a = model.get_parameter("blocks.0.attn.q.lora_a")
    assert 0 < a.abs().max() <= 32**-0.5


def test_an_adapter_is_what_its_formula_says() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(6, 5, bias=True, lora=Lora(rank=2, alpha=6))
    nn.init.normal_(layer.lora_a), nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 4, 6)
    base = F.linear(x, layer.weight, layer.bias)
    want = base + 3 * (x @ layer.lora_a.T @ layer.lora_b.T)
    torch.testing.assert_close(layer.added(x, base), want)


def test_an_adapter_is_pefts() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours = LoraLinear(16, 24, bias=True, lora=Lora(rank=4, alpha=8))
    nn.init.normal_(ours.lora_a), nn.init.normal_(ours.lora_b)
    base = nn.Linear(16, 24)
    base.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(base), config)
    state = {name: param for name, param in theirs.named_parameters() if param.requires_grad}
    assert {tuple(param.shape) for param in state.values()} == {(4, 16), (24, 4)}
    with torch.no_grad():
        for name, param in state.items():
            param.copy_(ours.lora_a if "lora_A" in name else ours.lora_b)
    x = torch.randn(2, 3, 16)
    got = ours.added(x, F.linear(x, ours.weight, ours.bias))
    torch.testing.assert_close(got, theirs(x))
    grads = torch.autograd.grad(got.square().sum(), (ours.lora_a, ours.lora_b))
    want = torch.autograd.grad(theirs(x).square().sum(), list(state.values()))
    for mine, other in zip(grads, want, strict=True):
        torch.testing.assert_close(mine, other)
