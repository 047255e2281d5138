"""Products of tensor, pipeline and data parallelism: as plain PyTorch trains, with the forecast's bytes on every stage."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from estimator.job import Job, Strategy
from estimator.predict import lay_out, memory_of, traffic_of
from runtime.reference import excess
from runtime.session import Measurement, SessionOptions, run_session
from tests.runtime import tiny
from tests.runtime.groups import run_ranks
from tests.runtime.memory import MODELS, compare, metered
from tests.runtime.parity_worker import gloo_group

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 20
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


def _rank(rank: int, world: int, folder: str, numbers: list[int]) -> None:
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        for number in numbers:
            try:
                options = SessionOptions(steps=STEPS - 1, warmup=0, reference=True)
                found: Measurement | str = run_session(_job(world, number), "cpu", options, rank=rank)
            except Exception:
                found = traceback.format_exc()
            Path(folder, f"{number}-{rank}").write_bytes(pickle.dumps(found))
            if isinstance(found, str):
                break


def _train(world: int, numbers: list[int], folder: Path) -> None:
    run_ranks(_rank, world, str(folder), numbers)
    for number in numbers:
        job = _job(world, number)
        found = [pickle.loads(Path(folder, f"{number}-{rank}").read_bytes()) for rank in range(world)]
        ranks = [one for one in found if isinstance(one, Measurement)]
        assert len(ranks) == world, next(one for one in found if isinstance(one, str))
        said = (job.model.name, job.strategy)
        assert excess(job.strategy.dtype, ranks[0].parity, job.strategy.n_summands) is None, said
        for place, rank in enumerate(ranks):
            blueprint = lay_out(job, job.mesh.place("pp", place))
            traffic = rank.collective_bytes, rank.collective_calls, rank.copy_bytes
            assert traffic == traffic_of(blueprint.program, blueprint.costs), said
            compare(rank, memory_of(blueprint))


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
