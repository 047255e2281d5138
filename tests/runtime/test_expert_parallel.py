"""Expert parallelism: as plain PyTorch trains, with the forecast's bytes in memory and between ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy
from estimator.predict import lay_out, memory_of, traffic_of
from runtime import initialize
from runtime.comm import Communicator
from runtime.models import Decoder
from runtime.parallel.experts import ExpertParallel
from runtime.parallel.layers import WholeLayers
from runtime.reference import PARITY_OPTIMIZER, TOLERANCES, relative_difference, train_plain
from runtime.session import Measurement, SessionOptions, run_session
from tests.runtime import experts, tiny
from tests.runtime.groups import run_ranks
from tests.runtime.memory import STATES, compare, metered
from tests.runtime.parity_worker import batch, gloo_group
from tests.runtime.sessions import measured, train
from tests.runtime.test_experts_memory import MODELS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(600)]


def with_capacity(spec: ModelSpec, factor: float) -> ModelSpec:
    assert spec.experts is not None
    return replace(spec, experts=replace(spec.experts, capacity_factor=factor))


# ---- as plain PyTorch ---------------------------------------------------------------------------------------------------

WAYS: tuple[dict[str, Any], ...] = (
    {"zero_stage": 0, "optimizer": "sgd", "grad_clip": 0.1},
    {"zero_stage": 1, "recompute": "full", "optimizer": "sgd", "grad_clip": 0.1},
    {"zero_stage": 2, "recompute": "selective", "grad_clip": 0.0},
    {"zero_stage": 3, "recompute": "full", "optimizer": "sgd", "grad_clip": 0.1},
    {"zero_stage": 3, "offload": "optimizer,param"},
    {"zero_stage": 1, "offload": "optimizer", "offload_fraction": 0.5, "recompute": "mlp"},
    {"zero_stage": 2, "offload": "optimizer", "delayed_update": True},
    {"zero_stage": 3, "persistent_numel": 700, "recompute": "full", "recompute_every": 2},
    {"zero_stage": 2, "recompute": "attention", "grad_clip": 0.0},
    {"zero_stage": 3, "dtype": "bf16", "grad_dtype": "fp32"},
    {"zero_stage": 0, "dtype": "fp16", "grad_clip": 0.1},
)
"""SGD, because Adam hardly notices a wrong factor on all gradients."""
SPECS = (
    (experts.MIXTRAL, 0.0, 2), (experts.QWEN_MOE, 1.0, 2), (experts.DEEPSEEK_V3, 0.0, 4), (experts.DEEPSEEK_V2, 1.25, 4),
    (experts.BIASED, 0.0, 4), (experts.BIASED, 0.5, 2),
)  # fmt: skip
"""Model, capacity factor, ``ep`` on four ranks; on two it is 2."""


def _job(world: int, number: int) -> Job:
    fields = WAYS[number % len(WAYS)]
    spec, factor, ep = SPECS[number // len(WAYS)]
    strategy = Strategy(ep=min(ep, world), bucket_bytes=20_000, **{"dtype": "fp32", **fields})
    return tiny.job(with_capacity(spec, factor), strategy, world=world, n_micro_batches=1 + number % 2, arch="cpu")


QUICK = {2: (0, 14), 4: (25, 36, 57)}


def _train(world: int, numbers: list[int], folder: Path) -> None:
    jobs = [_job(world, number) for number in numbers]
    for number, job, found in zip(numbers, jobs, train(jobs, folder), strict=True):
        ranks = measured(found)
        said, allowed = (number, job.model.name, job.strategy), TOLERANCES[job.strategy.dtype]
        assert ranks[0].parity["loss"] <= allowed.loss, said
        # routers turn the rounding of 16 bits into other choices, with any ep
        assert ranks[0].parity["params"] <= allowed.params * (1 if job.strategy.dtype == "fp32" else 3), said
        assert job.model.experts is not None
        for one in ranks:
            _check_bytes(one, job, is_fixed=job.model.experts.capacity_factor > 0)


def _check_bytes(got: Measurement, job: Job, *, is_fixed: bool) -> None:
    """With a capacity everything; else what does not depend on the router."""
    blueprint = lay_out(job)
    n_bytes, calls, copies = traffic_of(blueprint.program, blueprint.costs)
    assert (got.collective_calls, got.copy_bytes) == (calls, copies)
    forecast = memory_of(blueprint)
    if is_fixed:
        assert got.collective_bytes == n_bytes
        for category in STATES:
            assert got.category_peak_bytes.get(category, 0) == forecast.category_peak_bytes.get(category, 0)
        assert got.peak_allocated_bytes == pytest.approx(forecast.peak_bytes, rel=1e-3)
        return
    assert {**got.collective_bytes, "all_to_all": 0} == {**n_bytes, "all_to_all": 0}
    assert got.collective_bytes["all_to_all"] >= n_bytes["all_to_all"], "what it sends at least"
    for category in STATES:
        assert got.category_peak_bytes.get(category, 0) == forecast.category_peak_bytes.get(category, 0)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_it_trains_as_plain_pytorch_with_the_forecast_bytes(world: int, tmp_path: Path) -> None:
    _train(world, list(QUICK[world]), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", sorted(QUICK))
def test_all_of_them_do(world: int, tmp_path: Path) -> None:
    _train(world, [n for n in range(len(SPECS) * len(WAYS)) if n not in QUICK[world]], tmp_path)


LOPSIDED = with_capacity(experts.BIASED, 0.0)


def _lean(model: nn.Module) -> None:
    """Every token chooses the first expert."""
    for name, param in model.named_parameters():
        if "router" in name:
            param.data.zero_()
        if name.endswith("router.bias"):
            param.data[0] = 9.0


def _lopsided(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        comm = Communicator()
        model = Decoder(LOPSIDED, layers=WholeLayers(experts=ExpertParallel(comm, world)))
        model.reset_parameters(0)
        _lean(model)
        strategy = Strategy(ep=world, dtype="fp32", zero_stage=2, bucket_bytes=20_000)
        engine = initialize(model=model, strategy=strategy, optimizer=PARITY_OPTIMIZER, comm=comm)
        for _ in range(4):
            engine.backward(engine(*batch(0, rank)))
            engine.step()
        torch.save((engine.full_parameters(), engine.comm.bytes["all_to_all"]), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_a_rank_to_which_nobody_comes(tmp_path: Path) -> None:
    """All rows go to the first rank: it gets twice the mean, the other one nothing."""
    run_ranks(_lopsided, 2, str(tmp_path))
    (got, busy), (again, idle) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = Decoder(LOPSIDED)
    model.reset_parameters(0)
    _lean(model)
    plain = train_plain(
        model, Strategy(dtype="fp32", zero_stage=2), PARITY_OPTIMIZER, lambda _, rank, micro: batch(micro, rank),
        n_ranks=2, n_micro_batches=1, steps=4,
    )  # fmt: skip
    assert relative_difference(got, plain.params) <= TOLERANCES["fp32"].params
    assert all(torch.equal(got[name], again[name]) for name in got)
    rows = 2 * 16 * 32 * 4
    assert (busy, idle) == (2 * (4 * 2 * rows + 4 * 8), 2 * (4 * rows + 4 * 8))


# ---- memory and traffic without data ------------------------------------------------------------------------------------

GRID = [
    case
    for case in itertools.product(
        ("mixtral", "deepseek-v3"), (2, 4, 8), (0, 1, 2, 3), ("none", "selective", "full"), (0.0, 1.25)
    )
    if case[:2] != ("mixtral", 8)
]
"""Model x ep x stage x recomputation x capacity factor on eight ranks: 120 cases."""
FAST = GRID[::13]


def _meta_job(name: str, ep: int, stage: int, recompute: str, factor: float, **fields: Any) -> Job:
    strategy = Strategy(
        ep=ep, zero_stage=stage, recompute=recompute, bucket_bytes=300_000, prefetch_depth=1 + stage % 2, **fields
    )
    spec = with_capacity(MODELS[name], factor)
    return tiny.job(spec, strategy, world=8, n_micro_batches=1 + stage % 2, micro_batch=4, seq_len=64)


def _check_meta(job: Job) -> Measurement:
    got, blueprint = metered(job, rank=5), lay_out(job)
    traffic = got.collective_bytes, got.collective_calls, got.copy_bytes
    assert traffic == traffic_of(blueprint.program, blueprint.costs)
    compare(got, memory_of(blueprint))
    return got


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow, id="-".join(map(str, c))) for c in GRID]
)
def test_live_bytes_and_traffic_are_the_forecast_s(case: tuple) -> None:
    _check_meta(_meta_job(*case))


@pytest.mark.parametrize(
    "fields",
    [
        {"offload": "optimizer,param"}, {"offload": "optimizer", "offload_fraction": 0.4}, {"offload": "optimizer:nvme"},
        {"persistent_numel": 1000}, {"delayed_update": True, "offload": "optimizer"}, {"kernels_off": ("all",), "dtype": "fp32"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("ep", [2, 8])
def test_with_other_choices(fields: dict[str, Any], ep: int) -> None:
    """On eight ranks that share eight experts no two have the same."""
    _check_meta(_meta_job("deepseek-v3", ep, 3, "none", 0.0, **fields))


@pytest.mark.parametrize("recompute", ["attention", "mlp", "activation,norms"])
def test_parts_of_blocks_recomputed(recompute: str) -> None:
    _check_meta(_meta_job("mixtral", 2, 2, recompute, 1.25))


def test_a_loaded_rank_needs_more() -> None:
    even, loaded = (
        _check_meta(_meta_job("mixtral", 4, 1, "none", 0.0, expert_imbalance=x)).category_peak_bytes["activations"]
        for x in (1.0, 1.75)
    )
    assert even < loaded < 1.75 * even


@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize("stage", [0, 3])
def test_a_virtual_rank_trains_on_plausible_values(stage: int, factor: float) -> None:
    strategy = Strategy(ep=2, zero_stage=stage, dtype="fp32", recompute="full", bucket_bytes=20_000)
    job = tiny.job(with_capacity(experts.MIXTRAL, factor), strategy, world=4, n_micro_batches=2, arch="cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        got = run_session(job, "cpu", SessionOptions(steps=2, warmup=1), rank=1)
    finally:
        dist.destroy_process_group()
    assert all(math.isfinite(loss) for loss in got.losses)
    _check_bytes(got, job, is_fixed=factor > 0)


def test_a_model_that_was_not_made_for_it_is_refused() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        with torch.device("meta"):
            model = Decoder(experts.MIXTRAL)
        with pytest.raises(InputError, match="ep is 2; the model was made for 1"):
            initialize(model=model, strategy=Strategy(ep=2))
        with pytest.raises(InputError, match="ep is 3; allowed: a divisor of the 4 data-parallel GPUs"):
            ExpertParallel(Communicator(), 3)
        with (
            torch.device("meta"),
            pytest.raises(InputError, match="ep is 4; allowed: a divisor of the model's 6 experts"),
        ):
            Decoder(experts.QWEN_MOE, layers=WholeLayers(experts=ExpertParallel(Communicator(), 4)))
    finally:
        dist.destroy_process_group()
