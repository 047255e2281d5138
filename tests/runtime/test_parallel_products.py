"""Products of tensor, pipeline and data parallelism: as plain PyTorch trains, with the forecast's bytes on every stage."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from estimator.job import Job, Strategy
from estimator.predict import lay_out, memory_of, traffic_of
from tests.runtime import tiny
from tests.runtime.memory import MODELS, compare, metered
from tests.runtime.sessions import check, measured, train, train_and_check

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS: tuple[dict[str, Any], ...] = (
    {"zero_stage": 1},
    {"zero_stage": 3, "recompute": "full", "sequence_parallel": False},
    {"zero_stage": 2, "dtype": "bf16", "recompute": "selective", "grad_clip": 0.5},
    {"virtual_pp": 2, "pp_schedule": "interleaved_1f1b"},
    {"zero_stage": 1, "dtype": "fp16", "pp_schedule": "gpipe"},
)
NAMES = ("gpt", "llama", "qwen3", "neox", "gemma2")
QUICK = [12]


def _job(world: int, number: int) -> Job:
    name, fields = list(product(NAMES, WAYS))[number]
    spec = replace(MODELS[name], n_layers=4, n_kv_heads=max(2, MODELS[name].n_kv_heads))
    fields = {"tp": 2, "pp": 2, "dtype": "fp32", "bucket_bytes": 20_000, **fields}
    return tiny.job(spec, Strategy(**fields), world=world, arch="cpu", n_micro_batches=4)


def _train(world: int, numbers: list[int], folder: Path) -> None:
    train_and_check([_job(world, number) for number in numbers], folder)


@pytest.mark.slow
def test_tensor_and_pipeline_ranks_train_as_plain_pytorch(tmp_path: Path) -> None:
    _train(4, QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_so_do_all_models_and_ways(tmp_path: Path) -> None:
    _train(4, [n for n in range(len(NAMES) * len(WAYS)) if n not in QUICK], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_with_data_parallel_ranks_beside_them(tmp_path: Path) -> None:
    _train(8, [1, 5, 7, 13, 17, 24], tmp_path)


BESIDE: tuple[dict[str, Any], ...] = (
    {"zero_stage": 2, "shard_size": 2},
    {"zero_stage": 3, "shard_size": 2, "recompute": "full"},
    {"zero_stage": 3, "secondary_shard": 2, "virtual_pp": 2, "pp_schedule": "interleaved_1f1b"},
    {"zero_stage": 1, "shard_size": 2, "pp_schedule": "zero_bubble"},
    {"cp": 2, "zero_stage": 3, "cp_kind": "ring"},
    {"cp": 2, "tp": 2, "zero_stage": 1, "pp_schedule": "zero_bubble"},
    {"cp": 2, "zero_stage": 2, "grad_clip": 0.5},
)
"""What goes with pipelines on eight ranks."""
ROUNDED: tuple[dict[str, Any], ...] = (
    {"zero_stage": 3, "quantized_weights": True},
    {"zero_stage": 2, "quantized_grads": 2},
    {"zero_stage": 0, "grad_compression": "one_bit"},
    {"zero_stage": 1, "grad_compression": "adacomp", "pp_schedule": "zero_bubble"},
)


def _beside(world: int, **fields: Any) -> Job:
    spec = replace(MODELS["gpt"], n_layers=4)
    usual = {"pp": 2, "dtype": "fp32", "bucket_bytes": 20_000}
    return tiny.job(spec, Strategy(**{**usual, **fields}), world=world, arch="cpu", n_micro_batches=4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pipelines_with_other_groups_of_ranks(tmp_path: Path) -> None:
    train_and_check([_beside(8, **fields) for fields in BESIDE], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pipelines_with_what_rounds_messages(tmp_path: Path) -> None:
    """They send and hold what is forecast, and learn about as much as an exact run."""
    jobs = [_beside(4), *(_beside(4, **fields) for fields in ROUNDED)]
    results = list(zip(jobs, train(jobs, tmp_path), strict=True))
    for job, found in results:
        check(job, found)
    exact, *others = (measured(found)[-1].losses[-1] for _, found in results)
    assert others == pytest.approx([exact] * len(others), rel=0.02)


@pytest.mark.parametrize("rank", [1, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fields", [*BESIDE[:2], *ROUNDED], ids=str)
def test_their_live_bytes_and_messages(fields: dict[str, Any], rank: int) -> None:
    strategy = Strategy(**{"pp": 2, "dtype": "bf16", "bucket_bytes": 300_000, **fields})
    spec = replace(MODELS["gpt"], n_layers=5)
    job = tiny.job(spec, strategy, world=8, n_micro_batches=4, micro_batch=4, seq_len=64)
    got, blueprint = metered(job, rank=rank), lay_out(job, job.mesh.place("pp", rank))
    compare(got, memory_of(blueprint))
    traffic = got.collective_bytes, got.collective_calls, got.copy_bytes
    assert traffic == traffic_of(blueprint.program, blueprint.costs)


@pytest.mark.parametrize("rank", [0, 5, 14, 31])
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_any_rank_of_a_larger_job_alone(way: int, rank: int) -> None:
    """32 ranks on tensors without data: 2 tensor-parallel, 4 data-parallel, 4 stages."""
    spec = replace(MODELS["llama"], n_layers=8)
    fields = {"tp": 2, "pp": 4, "dtype": "bf16", "bucket_bytes": 200_000, **WAYS[way]}
    job = tiny.job(spec, Strategy(**fields), world=32, n_micro_batches=4, micro_batch=4, seq_len=64)
    got, blueprint = metered(job, rank=rank), lay_out(job, job.mesh.place("pp", rank))
    assert (got.collective_bytes, got.collective_calls) == traffic_of(blueprint.program, blueprint.costs)[:2]
    compare(got, memory_of(blueprint))
