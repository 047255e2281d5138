"""Steps of PyTorch's own FSDP1 and FSDP2 on a fake process group on this CPU, with every live byte tracked.

The tracker knows nothing of this project: a dispatch mode notes the storage of whatever operators return, and after each operator
adds up those still alive, at the size they have then (FSDP2 empties and refills storages behind the dispatcher's back).
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from estimator.job import Job, Strategy
from estimator.memory.reader import StepMemory
from estimator.ops.style import PLAIN
from estimator.predict import lay_out, memory_of
from runtime.models.decoder import Decoder
from tests.runtime import tiny

STRATEGIES = {2: ShardingStrategy.SHARD_GRAD_OP, 3: ShardingStrategy.FULL_SHARD}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WIDE = replace(
    tiny.LLAMA, name="wide-llama", d_model=96, n_heads=6, n_kv_heads=3, head_dim=16, d_ff=260, vocab_size=301
)
DEEP = replace(tiny.LLAMA, name="deep-llama", n_layers=6, d_model=64, head_dim=16, d_ff=172, vocab_size=509)
ODD = replace(tiny.QWEN3, name="odd-qwen3", d_model=40, d_ff=101, vocab_size=131)
MODELS = {spec.name: spec for spec in (*tiny.ALL, WIDE, DEEP, ODD)}


class Tracker(TorchDispatchMode):
    """``peak`` bytes of all storages that operators made while it was active, or that it ``adopt``\\ ed."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.live = self.peak = 0

    def adopt(self, tensor: torch.Tensor) -> None:
        local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
        storage = local.untyped_storage()
        self.storages[storage._cdata] = weakref.ref(storage)

    def look(self) -> None:
        there = {key: storage for key, ref in self.storages.items() if (storage := ref()) is not None}
        self.storages = {key: self.storages[key] for key in there}
        self.live = sum(storage.nbytes() for storage in there.values())
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sharded = any(issubclass(kind, DTensor) for kind in types)
        lists = sharded and "foreach" in str(func)  # of an optimizer, whose temporaries no operator beneath shows
        if lists or not sharded:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor) and (lists or not isinstance(leaf, DTensor)):
                    self.adopt(leaf)
            self.look()
        return out


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(job: Job) -> torch.nn.Module:
    """The decoder of ``job`` with every block, and then the rest of it, under FSDP1 or FSDP2."""
    s = job.strategy
    model = Decoder(job.model, job.workload.seq_len)
    model.reset_parameters()
    for name, table in list(model.named_buffers()):
        setattr(model, name, table.to(DTYPES[s.dtype]))
    low = s.dtype != "fp32"
    dtypes: dict[str, Any] = {"param_dtype": DTYPES[s.dtype], "reduce_dtype": DTYPES[s.grads]} if low else {}
    shard: Any
    if s.framework == "fsdp2":
        mesh = init_device_mesh("cpu", (job.cluster.n_gpus,))
        shard = partial(
            fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(**dtypes), reshard_after_forward=s.zero_stage == 3
        )
    else:
        shard = partial(
            FullyShardedDataParallel, mixed_precision=MixedPrecision(**dtypes), use_orig_params=True,
            sharding_strategy=STRATEGIES[s.zero_stage], device_id=torch.device("cpu"),
        )  # fmt: skip
    for number, block in enumerate(model.blocks):
        if s.recompute == "full":
            block.forward = again(block.forward)
        model.blocks[number] = shard(block)
    if s.root_apart:  # torchtitan/models/llama3/infra/parallelize.py of 0.2: apply_fsdp
        shard(model.embed)
        shard(model.head, reshard_after_forward=False)
    return shard(model)


def again(forward: Any) -> Any:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


def tracked_step(job: Job) -> tuple[int, int]:
    """Bytes that live from step to step, and the peak of the second step."""
    w = job.workload
    with fake_world(job.cluster.n_gpus), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sharded(job)
        impl = {job.strategy.optimizer_impl: True}
        optimizer = torch.optim.AdamW(model.parameters(), **impl)

        def step() -> None:
            for _ in range(job.n_micro_batches):
                ids, labels = (
                    torch.randint(0, job.model.vocab_size, (w.micro_batch_size, w.seq_len)) for _ in range(2)
                )
                loss = model(ids, labels)
                loss.backward()
                del ids, labels, loss
            optimizer.step()
            optimizer.zero_grad()

        step()
        states = (value for state in optimizer.state.values() for value in state.values() if value.ndim)
        return tracked(step, chain(model.parameters(), states, model.buffers()))


def tracked(step: Callable[[], None], held: Iterator[torch.Tensor]) -> tuple[int, int]:
    """Bytes of the tensors ``held`` (an iterator, which keeps none alive) before a step, and the most that are live during it."""
    gc.collect()
    tracker = Tracker()
    for tensor in held:
        tracker.adopt(tensor)
    del tensor
    tracker.look()
    before = tracker.live
    with tracker:
        step()
    return before, tracker.peak


def case(
    framework: str, model: str, world: int, stage: int, *, dtype: str = "bf16", grads: str = "fp32", micro: int = 1,
    again: str = "none", rows: int = 2, slow: bool = True, apart: bool = False,
) -> Any:  # fmt: skip
    """A ``pytest.param`` of one job."""
    strategy = Strategy(
        zero_stage=stage, dtype=dtype, grad_dtype=grads, recompute=again, framework=framework, root_apart=apart,  # type: ignore[arg-type]
    )  # fmt: skip
    job = tiny.job(MODELS[model], strategy, world=world, n_micro_batches=micro, micro_batch=rows, arch="cpu")
    name = f"{model}-{world}-zero{stage}-{dtype}-{grads}-{micro}x{rows}-{again}" + "-apart" * apart
    return pytest.param(job, id=name, marks=[pytest.mark.slow] if slow else [])


def forecast(job: Job) -> StepMemory:
    """Of the framework's program around the reference decoder's operators: these models are the reference decoder, whose
    norms and activations are not those that the framework's users usually have."""
    with patch("estimator.predict.style_of", lambda *_: PLAIN):
        return memory_of(lay_out(job))
