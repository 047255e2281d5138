"""``fake`` says what ``cpu`` meters, to the byte: the same rank of the same job, without arithmetic and with gloo."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from estimator.job import Job, Strategy
from runtime.session import SessionOptions, run_session
from tests.runtime import experts, tiny
from tests.runtime.groups import run_ranks
from tests.runtime.parity_worker import gloo_group

MEMORY = ("peak_allocated_bytes", "peak_phase", "peak_where", "category_bytes_at_peak", "category_peak_bytes",
          "phase_peak_bytes", "phase_category_bytes", "host_bytes", "collective_bytes", "collective_calls", "copy_bytes")  # fmt: skip

MODELS = {spec.name.removeprefix("tiny-"): spec for spec in (*tiny.ALL, *experts.ALL)}
_AXES = {
    "model": tuple(MODELS)[: len(tiny.ALL)],
    "zero": (0, 1, 2, 3),
    "dtype": ("fp32", "bf16", "fp16"),
    "offload": ("none", "optimizer", "optimizer,param"),
    "recompute": ("none", "selective", "full"),
    "micro_batch": (1, 4),
    "n_micro_batches": (1, 3),
}
CASES = [dict(zip(_AXES, values, strict=True)) for values in itertools.product(*_AXES.values())]
BY_WORLD = {1: CASES[3:720:97], 2: CASES[::66], 4: CASES[20::109]}
"""Strides that make every value of every axis take turns: 8 + 33 + 20 cases."""
FEW = 3
"""Cases of each world size in the quick run."""


def job_of(case: dict[str, Any], world: int) -> Job:
    strategy = Strategy(
        zero_stage=case["zero"], dtype=case["dtype"], offload=case["offload"], recompute=case["recompute"]
    )
    return tiny.job(
        MODELS[case["model"]], strategy, world=world, micro_batch=case["micro_batch"], seq_len=16,
        n_micro_batches=case["n_micro_batches"], arch="cpu",
    )  # fmt: skip


def measured(case: dict[str, Any], world: int, rank: int, device: str) -> dict[str, Any]:
    # the loss scale of fp16 starts too high and halves until no gradient overflows: a skipped step would copy nothing
    warmup = 12 if case["dtype"] == "fp16" and device == "cpu" else 1
    options = SessionOptions(steps=1, warmup=warmup)
    result = asdict(run_session(job_of(case, world), device, options, rank=rank))  # type: ignore[arg-type]
    return {name: result[name] for name in MEMORY}


def real_rank(rank: int, world: int, folder: str, cases: list[dict[str, Any]]) -> None:
    """One gloo process: every case, results as JSON."""
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        results = [measured(case, world, rank, "cpu") for case in cases]
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


def check(world: int, cases: list[dict[str, Any]], folder: Path) -> None:
    run_ranks(real_rank, world, str(folder), cases)
    real = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
    for i, case in enumerate(cases):
        rank = i % world
        if world > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            fake = measured(case, world, rank, "fake-cpu")
        finally:
            if world > 1:
                dist.destroy_process_group()
        assert fake == real[rank][i], f"rank {rank} of {world}: {case}"


def test_there_are_at_least_forty_cases_and_every_value_takes_its_turn():
    chosen = [case for cases in BY_WORLD.values() for case in cases]
    assert len(chosen) >= 40
    assert all({case[name] for case in chosen} == set(values) for name, values in _AXES.items())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_fake_equals_cpu_to_the_byte(world, tmp_path):
    check(world, BY_WORLD[world][:: len(BY_WORLD[world]) // FEW][:FEW], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_fake_case_equals_cpu_to_the_byte(world, tmp_path):
    check(world, BY_WORLD[world], tmp_path)
