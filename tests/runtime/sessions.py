"""Jobs that groups of gloo processes train, beside plain PyTorch, and what every rank measured of them."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from estimator.job import Job
from estimator.job.grouping import rounding_fields
from estimator.predict import lay_out, memory_of, traffic_of
from runtime.reference import excess
from runtime.session import Measurement, SessionOptions, run_session
from tests.runtime.groups import run_ranks
from tests.runtime.memory import compare
from tests.runtime.parity_worker import gloo_group

STEPS = 20
WAYS: tuple[dict[str, Any], ...] = (
    {"zero_stage": 0, "dtype": "fp32"},
    {"zero_stage": 1, "dtype": "fp16", "recompute": "selective"},
    {"zero_stage": 2, "dtype": "bf16", "grad_clip": 0.0, "grad_dtype": "fp32"},
    {"zero_stage": 3, "dtype": "fp32", "recompute": "full"},
    {"zero_stage": 3, "dtype": "bf16", "offload": "optimizer,param", "persistent_numel": 200},
    {"zero_stage": 1, "dtype": "fp32", "recompute": "selective", "offload": "optimizer"},
)
"""Fields of strategies that every parallelism is crossed with."""
Found = list[Measurement | str]
"""By rank: what it measured, or what went wrong."""


def train(jobs: Sequence[Job], folder: Path) -> list[Found]:
    """By job, what each of its ranks found. All jobs have as many GPUs: one group of processes runs one after another."""
    world = jobs[0].cluster.n_gpus
    run_ranks(_rank, world, str(folder), list(jobs))
    files = [[folder / f"{number}-{rank}" for rank in range(world)] for number in range(len(jobs))]
    return [
        [pickle.loads(f.read_bytes()) if f.exists() else "an earlier job failed" for f in of_job] for of_job in files
    ]


def measured(found: Found) -> list[Measurement]:
    """Every rank's measurement; fails with what went wrong where there is none."""
    ranks = [one for one in found if isinstance(one, Measurement)]
    assert len(ranks) == len(found), next(one for one in found if isinstance(one, str))
    return ranks


def check(job: Job, found: Found, *, compared: slice = slice(None)) -> None:
    """``job`` trained as plain PyTorch does (unless it rounds what ranks exchange), every rank sent what is forecast, and those
    ``compared`` held it."""
    ranks, said = measured(found), (job.model.name, job.strategy)
    if not rounding_fields(job.strategy):
        assert excess(job.strategy.dtype, ranks[0].parity, job.strategy.n_summands) is None, said
    blueprints = [lay_out(job, job.mesh.place("pp", rank)) for rank in range(len(ranks))]
    for rank, blueprint in zip(ranks, blueprints, strict=True):
        traffic = rank.collective_bytes, rank.collective_calls, rank.copy_bytes
        assert traffic == traffic_of(blueprint.program, blueprint.costs), said
    for rank, blueprint in list(zip(ranks, blueprints, strict=True))[compared]:
        compare(rank, memory_of(blueprint))


def train_and_check(jobs: Sequence[Job], folder: Path, *, compared: slice = slice(None)) -> None:
    """``check`` of every job."""
    for job, found in zip(jobs, train(jobs, folder), strict=True):
        check(job, found, compared=compared)


def _rank(rank: int, world: int, folder: str, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        for number, job in enumerate(jobs):
            try:
                options = SessionOptions(steps=STEPS - 1, warmup=0, reference=not rounding_fields(job.strategy))
                found: Measurement | str = run_session(job, "cpu", options, rank=rank)
            except Exception:
                found = traceback.format_exc()
            Path(folder, f"{number}-{rank}").write_bytes(pickle.dumps(found))
            if isinstance(found, str):
                break  # the ranks are no longer at the same place
