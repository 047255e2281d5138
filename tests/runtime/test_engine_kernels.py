"""The engine's optimizer step and gradient norm by ``runtime.kernels``: as its torch bodies, switched off by name, never waited for.

Kernels run on the CPU shim, from their own source. The model is plain torch, so that nothing else differs.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

from estimator.job import Strategy
from estimator.job.kernels import KERNELS
from estimator.job.strategy import Dtype
from estimator.ops.kernels.optimizer import RULES
from runtime import Engine, OptimizerConfig, initialize
from runtime.kernels import registry
from runtime.reference import relative_difference
from tests.runtime.kernels.checks import needs_shim, on_shim

STEPS, OVERFLOW_AT = 10, 5
CONFIG = OptimizerConfig(lr=1e-2, eps=1e-5, weight_decay=0.1)
CLIP = 0.2
"""Below the norm of every gradient here."""
ROUNDING = {"fp32": 1e-6, "bf16": 5e-4, "fp16": 5e-4}
"""Largest relative difference of fp32 parameters (measured: 3e-7, 4e-5, 6e-6). fp32: each step's own rounding. 16 bits:
where that makes the model's parameters round to neighbours, what follows differs by as much."""


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Parameters of odd sizes, one of them frozen; three units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 37)
        self.middle = nn.ModuleList([nn.Linear(37, 37), nn.Linear(37, 37)])
        self.head = nn.Linear(37, 3)
        self.middle[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        for layer in self.middle:
            x = x + layer(x).tanh()
        return self.head(x)


def engine_of(strategy: Strategy, device: str = "cpu", n: int = 1) -> Engine:
    torch.manual_seed(0)
    return initialize(model=Net().to(device), strategy=strategy, n_micro_batches=n, optimizer=CONFIG)


def step(engine: Engine, number: int = 0, rank: int = 0) -> None:
    """One whole step on batches of its own."""
    for micro in range(engine.n_micro_batches):
        generator = torch.Generator().manual_seed(100 * number + 10 * rank + micro)
        x, y = torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)
        dtype = next(engine.model.parameters()).dtype
        logits = engine(x.to(engine.device, dtype))
        engine.backward(F.cross_entropy(logits.float(), y.to(engine.device)))
        assert engine.step() == (micro == engine.n_micro_batches - 1)


class Trained(NamedTuple):
    params: dict[str, Tensor]
    norms: list[float]
    bytes: dict[str, int]
    launches: Counter[str]
    n_groups: int
    """Of those that are trained."""
    kernels: frozenset[str]
    widens: bool


def train(strategy: Strategy, *, kernels: bool, rank: int = 0, n: int = 1) -> Trained:
    """With fp16 one step overflows, on rank 0 alone: nothing of the model may change in it on any."""
    with on_shim() if kernels else nullcontext() as record:
        engine = engine_of(strategy, n=n)
        norms = []
        for number in range(STEPS):
            overflows = strategy.dtype == "fp16" and number == OVERFLOW_AT
            before, scale = engine.full_parameters(), engine.scaler.scale
            if overflows and rank == 0:
                engine.scaler.scale = 2.0**60
            step(engine, number, rank)
            norms.append(float("nan") if engine.grad_norm is None else engine.grad_norm.item())
            if overflows:
                assert (engine.scaler.skipped_steps, engine.scaler.scale) == (1, (scale if rank else 2.0**60) / 2)
                assert all(torch.equal(before[name], now) for name, now in engine.full_parameters().items())
                engine.scaler.scale = scale
        assert engine.scaler.skipped_steps == (strategy.dtype == "fp16")
    launches = Counter(kernel.name for kernel, _ in record.launches) if record else Counter()
    widens = any(s.buffers.update_temp is not None for s in engine.storages)
    n_groups = sum(group.kind.trained for group in engine.layout.groups)
    return Trained(
        engine.full_parameters(), norms, dict(engine.comm.bytes), launches, n_groups, engine.kernels, widens
    )  # fmt: skip


def assert_same_training(got: Trained, want: Trained, dtype: Dtype) -> None:
    assert relative_difference(got.params, want.params) <= ROUNDING[dtype]
    assert got.norms == pytest.approx(want.norms, rel=2e-6 if dtype == "fp32" else 1e-2, nan_ok=True)
    assert got.bytes == want.bytes


@needs_shim
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_the_kernels_train_as_torch_does(optimizer: str, dtype: Dtype) -> None:
    strategy = Strategy(dtype=dtype, optimizer=optimizer, grad_clip=CLIP, bucket_bytes=4000)  # type: ignore[arg-type]
    got, want = train(strategy, kernels=True), train(strategy, kernels=False)
    assert min(norm for norm in want.norms if norm == norm) > CLIP
    assert_same_training(got, want, dtype)
    steps = STEPS * got.n_groups
    assert got.n_groups > 1
    assert got.launches == {"optimizer_step": steps, "chunk_squares": steps, "total_squares": steps}
    assert want.launches == {} and want.kernels == frozenset() and got.kernels == KERNELS.keys()
    assert not got.widens and want.widens == (dtype != "fp32")


@needs_shim
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_without_clipping_there_is_no_norm(dtype: Dtype) -> None:
    strategy = Strategy(dtype=dtype, grad_clip=0.0)
    got = train(strategy, kernels=True)
    assert_same_training(got, train(strategy, kernels=False), dtype)
    assert got.launches == {"optimizer_step": STEPS * got.n_groups}


@needs_shim
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_each_is_switched_off_by_name(optimizer: str) -> None:
    """What is left on still works; with all off the result is that of the torch bodies, bit by bit."""
    name, left = RULES[optimizer].kernel, {}
    want = None
    for off in ((name,), ("grad_norm",), (name, "grad_norm"), ("all",)):
        strategy = Strategy(dtype="fp16", optimizer=optimizer, grad_clip=CLIP, kernels_off=off)  # type: ignore[arg-type]
        want = want or train(strategy, kernels=False)
        got = train(strategy, kernels=True)
        assert_same_training(got, want, "fp16")
        assert got.widens == (off != ("grad_norm",))
        assert got.kernels == (frozenset() if off == ("all",) else KERNELS.keys() - set(off))
        left[off] = set(got.launches)
        if not got.launches:
            assert all(torch.equal(param, want.params[name]) for name, param in got.params.items())
    assert left == {
        (name,): {"chunk_squares", "total_squares"}, ("grad_norm",): {"optimizer_step"},
        (name, "grad_norm"): set(), ("all",): set(),
    }  # fmt: skip


@needs_shim
def test_the_environment_switches_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.ENVIRONMENT, "adam")
    got = train(Strategy(dtype="bf16"), kernels=True)
    assert got.kernels == KERNELS.keys() - {"adam"} and got.widens
    assert set(got.launches) == {"chunk_squares", "total_squares"}


@needs_shim
def test_a_step_on_the_host_has_no_kernels() -> None:
    strategy = Strategy(dtype="fp16", offload="optimizer")
    got, want = train(strategy, kernels=True), train(strategy, kernels=False)
    assert got.launches == {} and got.widens
    assert all(torch.equal(param, want.params[name]) for name, param in got.params.items())


class Listener(nn.Linear):
    """Says in each of its passes whether a kernel is switched on."""

    heard: list[tuple[str, bool]]

    def forward(self, x: Tensor) -> Tensor:
        self.heard.append(("forward", registry.enabled("rms_norm")))
        out = super().forward(x)
        out.register_hook(lambda _: self.heard.append(("backward", registry.enabled("rms_norm"))))
        return out


@pytest.mark.parametrize("off", [(), ("rms_norm",), ("rotary",), ("all",)])
def test_what_is_switched_off_is_off_for_the_model_too(off: tuple[str, ...]) -> None:
    model = Net()
    model.head = Listener(37, 3)
    heard: list[tuple[str, bool]] = []
    model.head.heard = heard
    step(initialize(model=model, strategy=Strategy(dtype="fp32", kernels_off=off)))
    on = off in ((), ("rotary",))
    assert heard == [("forward", on), ("backward", on)] and registry.enabled("rms_norm")


@pytest.mark.parametrize("off", [(), ("adam", "sgd"), ("grad_norm",), ("all",)])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_host_reads_nothing_in_a_step(dtype: Dtype, optimizer: str, off: tuple[str, ...]) -> None:
    """On ``meta`` there is nothing to read: a number asked for is an error."""
    engine = engine_of(Strategy(dtype=dtype, optimizer=optimizer, kernels_off=off), "meta")  # type: ignore[arg-type]
    for number in range(2):
        step(engine, number)
    assert engine.grad_norm is not None and engine.grad_norm.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        engine.grad_norm.item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("off", [(), ("all",)])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_host_never_waits_for_the_gpu(dtype: Dtype, off: tuple[str, ...]) -> None:
    engine = engine_of(Strategy(dtype=dtype, grad_clip=CLIP, kernels_off=off), "cuda")
    x, y = torch.randn(8, 5, device="cuda", dtype=next(engine.model.parameters()).dtype), torch.arange(8, device="cuda")
    for checked in (False, False, True, True):  # the first steps compile, load modules and make tables
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            engine.backward(F.cross_entropy(engine(x).float(), y % 3))
            engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- several ranks ----------------------------------------------------------------------------------------------------


def strategy_of(stage: int, dtype: Dtype) -> Strategy:
    return Strategy(zero_stage=stage, dtype=dtype, grad_clip=CLIP, bucket_bytes=4000)  # type: ignore[arg-type]


RANK_CASES: list[tuple[int, Dtype]] = [(0, "fp32"), (1, "bf16"), (2, "fp16"), (3, "fp16")]


def rank_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    outcomes: list[Any] = []
    for stage, dtype in RANK_CASES:
        outcomes.append([tuple(train(strategy_of(stage, dtype), kernels=k, rank=rank, n=2)) for k in (True, False)])
    torch.save(outcomes, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@needs_shim
def test_sharded_over_two_ranks(tmp_path: Path) -> None:
    """Each rank steps its shards; one overflow on any rank skips the step on all; one scalar on the wire for the norm."""
    mp.spawn(rank_of_two, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for (_, dtype), mine, theirs in zip(RANK_CASES, first, second, strict=True):
        got, want, other = Trained(*mine[0]), Trained(*mine[1]), Trained(*theirs[0])
        assert_same_training(got, want, dtype)
        steps = STEPS * got.n_groups
        assert got.launches == {"optimizer_step": steps, "chunk_squares": steps, "total_squares": steps}
        assert all(torch.equal(param, other.params[name]) for name, param in got.params.items())
