"""Forecasts for ``framework = "deepspeed"`` against DeepSpeed's own engine on a CPU, where it is installed: the project does not depend on it.

Found right with DeepSpeed 0.19.8. What lives is what the garbage collector knows of tensors between steps, and what a dispatch mode sees made
in a step (``tests.runtime.fully_sharded``); ranks are those of a fake group.
"""

from __future__ import annotations

import gc
import os
import sys
import warnings
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from estimator.job import Job, Strategy
from estimator.memory.reader import Follower, StepMemory
from estimator.ops.style import PLAIN
from estimator.predict import Blueprint, lay_out, memory_of
from runtime import functional
from runtime.kernels.cross_entropy import cross_entropy_reference
from runtime.models import decoder
from runtime.models.decoder import Decoder
from tests.runtime import tiny
from tests.runtime.fully_sharded import DTYPES, MODELS, tracked

os.environ.setdefault("DS_ACCELERATOR", "cpu")
deepspeed = pytest.importorskip("deepspeed")

pytestmark = pytest.mark.slow

MID = replace(
    tiny.LLAMA, name="mid-llama", n_layers=4, d_model=128, n_heads=8, n_kv_heads=4, head_dim=16, d_ff=344, vocab_size=97
)
MID_GPT = replace(
    tiny.GPT, name="mid-gpt", n_layers=4, d_model=128, n_heads=8, n_kv_heads=8, head_dim=16, d_ff=512, vocab_size=97
)
ALL = {**MODELS, "mid-llama": MID, "mid-gpt": MID_GPT}


class Attention(decoder.Attention):
    def forward(self, h: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        q, k, v = (self.layers.heads(layer(h), self.head_dim) for layer in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None and sin is not None:
            q, k = functional.rotate(q, cos, sin), functional.rotate(k, cos, sin)
        out: Tensor = self.out(self.core(q, k, v).flatten(2))
        return out


class Mlp(decoder.Mlp):
    def forward(self, h: Tensor) -> Tensor:
        if self.gate is None:
            out: Tensor = self.down(functional.activate(self.up(h), self.activation))
            return out
        gated, linear = self.gate(h), self.up(h)
        inner = functional.gated_activate(gated, linear, self.activation)
        del gated, linear
        out = self.down(inner)
        return out


class Block(decoder.Block):
    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        assert self.mlp_norm is not None
        if self.parallel_residual:
            return x + self.attn(self.attn_norm(x), cos, sin) + self.mlp(self.mlp_norm(x))
        x = x + self.attn_post_norm(self.attn(self.attn_norm(x), cos, sin))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


class Embedding(decoder.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.tokens(ids)
        return x if self.positions is None else x + self.positions(self.layers.positions(ids))


class Head(decoder.Head):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy_reference(self.out(self.norm(x)).float(), labels)


def of_modules(job: Job) -> Decoder:
    """The reference decoder with every layer called as a module, as models of Hugging Face are: DeepSpeed hooks itself into calls."""
    model, dtype = Decoder(job.model, job.workload.seq_len), DTYPES[job.strategy.dtype]
    model.reset_parameters()
    model.embed.__class__, model.head.__class__ = Embedding, Head
    for block in model.blocks:
        block.__class__, block.attn.__class__, block.mlp.__class__ = Block, Attention, Mlp
        if job.strategy.recompute == "full":
            block.forward = again(block.forward)
    for name, table in list(model.named_buffers()):
        setattr(model, name, table.to(dtype))
    return model.to(dtype)


def again(forward: Any) -> Any:
    """DeepSpeed's own checkpoint is reentrant too."""
    return lambda *args: checkpoint(forward, *args, use_reentrant=True)


def config_of(job: Job) -> dict[str, Any]:
    s, w = job.strategy, job.workload
    zero: dict[str, Any] = {"stage": s.zero_stage, "reduce_bucket_size": s.bucket_numel}
    if s.zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": s.resident_numel,
            "stage3_prefetch_bucket_size": s.prefetch_numel,
        }
        zero |= {"stage3_max_live_parameters": s.live_numel, "stage3_max_reuse_distance": s.live_numel}
    if s.overlap_comm is not None:
        zero["overlap_comm"] = s.overlap_comm
    if s.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": w.micro_batch_size,
        "gradient_accumulation_steps": job.n_micro_batches,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "bf16": {"enabled": s.dtype == "bf16"},
        "data_types": {"grad_accum_dtype": s.grads},
    }


def tensors() -> list[Tensor]:
    """All that the garbage collector knows."""
    return [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and o.device.type == "cpu"]


def tracked_step(job: Job) -> tuple[int, int]:
    """Bytes that live from step to step, and the peak of the third step (stage 3 records two)."""
    w = job.workload
    others = {t.untyped_storage()._cdata for t in tensors()}
    optimizer = torch.optim.AdamW((model := of_modules(job)).parameters(), fused=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(job), dist_init_required=False)[0]

    def step() -> None:
        for _ in range(job.n_micro_batches):
            ids, labels = (torch.randint(0, job.model.vocab_size, (w.micro_batch_size, w.seq_len)) for _ in range(2))
            loss = engine(ids, labels)
            engine.backward(loss)
            del ids, labels, loss
            engine.step()

    step()
    step()
    gc.collect()
    return tracked(step, (tensor for tensor in tensors() if tensor.untyped_storage()._cdata not in others))


def run_apart(job: Job) -> tuple[int, int]:
    """In a process of its own: DeepSpeed keeps groups for good."""
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        held, peak = said.split()
        return int(held), int(peak)
    try:
        os.environ.update(LOCAL_RANK="0", RANK="0")
        setattr(sys.modules["deepspeed.comm.torch"], "build_shm_op", lambda: None)  # noqa: B010 (it would be compiled)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=job.cluster.n_gpus)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            os.write(writing, "{} {}".format(*tracked_step(job)).encode())
    finally:
        os._exit(0)


def forecast(job: Job) -> tuple[int, StepMemory]:
    """Peak of device and host together (one CPU is both here)."""
    with patch("estimator.predict.style_of", lambda *_: PLAIN._replace(early_stop=False)):
        blueprint = lay_out(job)
    memory = memory_of(blueprint)
    return _both(blueprint) if job.strategy.offload_optimizer else memory.peak_bytes, memory


def _both(blueprint: Blueprint) -> int:
    follower, most = Follower(blueprint.layout.units, blueprint.costs, blueprint.tables), 0
    for section in (blueprint.program.init, *(s.events * s.repeat for s in blueprint.program.step)):
        for event in section:
            most = max(most, sum(follower.follow(event).values()) + sum(follower.host.values()))
    return most


def case(
    model: str, world: int, stage: int, *, bucket: int, small: int = 1000, ahead: int = 60_000, live: int = 200_000,
    rows: int = 2, micro: int = 1, **fields: Any,
) -> Any:  # fmt: skip
    name = f"{model}-{world}-zero{stage}-{bucket}-{micro}x{rows}-" + "-".join(map(str, fields.values()))
    width = 4 if fields.get("dtype") == "fp32" else 2
    stage3: dict[str, Any] = (
        {"persistent_numel": small, "prefetch_numel": ahead, "live_numel": live} if stage == 3 else {}
    )
    strategy = Strategy(framework="deepspeed", zero_stage=stage, bucket_bytes=bucket * width, **stage3, **fields)
    job = tiny.job(ALL[model], strategy, world=world, n_micro_batches=micro, micro_batch=rows, arch="cpu")
    return pytest.param(job, id=name)


CASES = [
    case("mid-llama", 64, 3, bucket=60_000, small=1, ahead=1, live=1, rows=1),
    case("mid-llama", 64, 3, bucket=60_000, ahead=50_000_000, live=1_000_000_000, rows=1),
    case("mid-llama", 64, 3, bucket=200_000),
    case("mid-llama", 64, 3, bucket=50_000, small=1, ahead=20_000, live=60_000, rows=4, recompute="full"),
    case("mid-llama", 8, 3, bucket=60_000, overlap_comm=True),
    case("mid-gpt", 16, 3, bucket=200_000, ahead=80_000, live=300_000),
    case("mid-gpt", 16, 3, bucket=100_000, ahead=80_000, live=100_000, recompute="full"),
    case("deep-llama", 64, 3, bucket=50_000, ahead=30_000, live=50_000, rows=1, micro=2, grad_dtype="fp32"),
    case("deep-llama", 4, 2, bucket=60_000),
    case("mid-llama", 64, 2, bucket=60_000, micro=2, overlap_comm=True),
    case("mid-llama", 64, 2, bucket=60_000),
    case("mid-gpt", 8, 2, bucket=70_000, rows=8),
    case("mid-gpt", 8, 2, bucket=70_000, rows=8, micro=2, grad_dtype="fp32"),
    case("mid-llama", 64, 1, bucket=60_000),
    case("mid-llama", 64, 1, bucket=60_000, micro=2),
    case("mid-llama", 64, 1, bucket=60_000, overlap_comm=True),
    case("mid-llama", 64, 1, bucket=60_000, micro=2, overlap_comm=True),
]


@pytest.mark.parametrize("job", CASES)
def test_peak_is_that_of_deepspeed(job: Job) -> None:
    held, peak = run_apart(job)
    got, memory = forecast(job)
    assert sum(memory.phase_category_bytes["init"].values()) == pytest.approx(held, rel=0.01)
    assert got == pytest.approx(peak, rel=0.02)
