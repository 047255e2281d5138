"""Vision transformers: the same numbers as plain code, the bytes of the forecast, training as in plain PyTorch."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.job.encoder import Encoder
from estimator.job.files import job_from_dict, job_to_dict
from estimator.job.patches import Patches
from estimator.predict import lay_out, memory_of, model_flops_of, traffic_of
from estimator.sharding.units import model_units
from runtime.models import build
from runtime.reference import excess
from runtime.session import SessionOptions, run_session
from runtime.units import find_units
from tests.runtime import tiny
from tests.runtime.encoders import VIT
from tests.runtime.memory import check, compare, metered

WIDE = replace(
    VIT, d_model=128, head_dim=32, n_heads=4, n_kv_heads=4, d_ff=512, vocab_size=1024, max_positions=50, position_rows=50,
    patches=Patches(image_size=62, patch_size=8, channels=3),
)  # fmt: skip
"""Whose images have edges that no patch reads."""


def test_units_are_the_estimators() -> None:
    for spec in (VIT, WIDE):
        live = [found.unit for found in find_units(build(spec))]
        assert [(u.name, u.params, u.borrows, u.backward_reads) for u in live] == [
            (u.name, u.params, u.borrows, u.backward_reads) for u in model_units(spec)
        ]


def plainly(p: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """``VIT`` with the parameters ``p``, patch by patch. Checked against transformers 5.23 (``ViTForImageClassification``: loss and
    gradients, weights copied) where that was installed."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ p[f"{name}.weight"].flatten(1).T + p[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-12)

    patches = [images[:, :, y : y + 4, x : x + 4].flatten(1) for y in range(0, 16, 4) for x in range(0, 16, 4)]
    tokens = [linear("embed.project", patch) for patch in patches]
    x = torch.stack([p["embed.first"][0, 0].expand_as(tokens[0]), *tokens], dim=1) + p["embed.positions"]
    for name in ("blocks.0", "blocks.1"):
        h = norm(f"{name}.attn_norm", x)
        q, k, v = (linear(f"{name}.attn.{which}", h).unflatten(-1, (2, 16)).transpose(1, 2) for which in "qkv")
        scores = (q @ k.mT / math.sqrt(16)).softmax(-1)
        x = x + linear(f"{name}.attn.out", (scores @ v).transpose(1, 2).flatten(2))
        x = x + linear(f"{name}.mlp.down", F.gelu(linear(f"{name}.mlp.up", norm(f"{name}.mlp_norm", x))))
    return F.cross_entropy(linear("head.out", norm("head.norm", x)[:, 0]), labels)


def test_loss_and_gradients_are_those_of_plain_code() -> None:
    model = build(VIT)
    model.reset_parameters(3, std=0.2)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel())))
    plain = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(5, 3, 16, 16, generator=generator), torch.randint(10, (5,), generator=generator)
    got, want = model(*batch), plainly(plain, *batch)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    got.backward()
    want.backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(
            param.grad, plain[name].grad, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    with pytest.raises(InputError, match=r"images are \[3, 16, 17\]; allowed: \[3, 16, 16\]"):
        model(torch.zeros(1, 3, 16, 17), batch[1])


GRID = list(itertools.product((0, 1, 2, 3), ("none", "selective", "full"), (1, 4), ("bf16", "fp32", "fp16")))


def case(index: int) -> Job:
    stage, recompute, micro_batch, dtype = GRID[index]
    strategy = Strategy(
        zero_stage=stage, recompute=recompute, dtype=dtype, bucket_bytes=300_000,  # type: ignore[arg-type]
        kernels_off=("all",) if index % 2 else (), offload="optimizer" if index % 5 == 4 else "none",
        recompute_every=1 + (index % 6 == 5), persistent_numel=200 * (index % 7 == 3),
    )  # fmt: skip
    return tiny.job(
        WIDE, strategy, world=2 + 6 * (index % 2), n_micro_batches=1 + index % 3, micro_batch=micro_batch, seq_len=50
    )


@pytest.mark.parametrize("index", range(0, len(GRID), 5))
def test_peak_and_states(index: int) -> None:
    check(case(index))


@pytest.mark.slow
@pytest.mark.parametrize("index", [i for i in range(len(GRID)) if i % 5])
def test_peak_and_states_everywhere(index: int) -> None:
    check(case(index))


@pytest.mark.parametrize(("recompute", "dtype", "micro_batch"), [("none", "fp32", 4), ("full", "bf16", 1)])
def test_a_cpu_keeps_what_is_forecast(recompute: Any, dtype: Any, micro_batch: int) -> None:
    strategy = Strategy(zero_stage=3, dtype=dtype, recompute=recompute)
    job = tiny.job(WIDE, strategy, world=2, micro_batch=micro_batch, seq_len=50, arch="cpu")
    compare(metered(job, "fake-cpu"), memory_of(lay_out(job)))


def test_flops_by_hand() -> None:
    """Two images of 16 patches and one token: D 32, F 128, 48 numbers a patch, 10 classes of one token each."""
    job = tiny.job(VIT, Strategy(dtype="fp32"), micro_batch=2, seq_len=17)
    blocks = 2 * (2 * 34 * (4 * 32 * 32 + 2 * 32 * 128) + 2 * 4 * 17 * 17 * 32)
    assert model_flops_of(job) == (3 * (2 * 2 * 16 * 48 * 32 + blocks + 2 * 2 * 32 * 10), 0)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("stage", "offload", "recompute"), [(0, "none", "none"), (3, "optimizer,param", "full")])
def test_trains_as_plain_pytorch(stage: Any, offload: Any, recompute: Any) -> None:
    strategy = Strategy(
        zero_stage=stage, dtype="fp32", grad_clip=0.0, bucket_bytes=20_000, recompute=recompute, offload=offload
    )
    job = tiny.job(VIT, strategy, n_micro_batches=2, seq_len=17, arch="cpu")
    got = run_session(job, "cpu", SessionOptions(steps=6, warmup=2, reference=True))
    assert (got.collective_bytes, got.collective_calls, got.copy_bytes) == traffic_of(lay_out(job).program)
    assert excess("fp32", got.parity) is None
    compare(got, memory_of(lay_out(job)))


def test_at_the_door() -> None:
    job = tiny.job(VIT, Strategy(dtype="fp32"), seq_len=17)
    assert job_from_dict(json.loads(json.dumps(job_to_dict(job)))) == job
    with pytest.raises(
        InputError, match="seq_len is 16; allowed: 17, the patches of an image of tiny-vit and one token more"
    ):
        tiny.job(VIT, Strategy(dtype="fp32"), seq_len=16)
    for change, said in (
        ({"encoder": None}, "model.patches are set; allowed: with an encoder alone"),
        ({"encoder": Encoder(token_types=2)}, "without token_types"),
        ({"position_rows": 16}, "position_rows is 16 and max_positions 17; allowed: 17 each"),
        ({"embedding_norm": True}, "norms after the residual, an embedding_norm or tied_embeddings; allowed: neither"),
    ):
        with pytest.raises(InputError, match=said):
            replace(VIT, **change)
    with pytest.raises(InputError, match="patch_size is 17; allowed: at most image_size = 16"):
        Patches(image_size=16, patch_size=17)
    with pytest.raises(InputError, match="tp is 2, but tiny-vit has an encoder"):
        tiny.job(VIT, Strategy(dtype="fp32", tp=2), seq_len=17, world=2)
