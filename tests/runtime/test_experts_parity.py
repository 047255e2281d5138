"""Engines train models with experts and latent attention as plain PyTorch does, and move the forecast's bytes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from estimator.job import ModelSpec, Strategy
from estimator.predict import lay_out, traffic_of
from runtime.reference import TOLERANCES, relative_difference
from tests.runtime import experts, tiny
from tests.runtime.groups import run_ranks
from tests.runtime.parity_worker import Outcome, run_plain, worker

pytestmark = pytest.mark.timeout(600)
MODELS = {spec.name: spec for spec in experts.ALL}


class Case(NamedTuple):
    name: str
    world: int
    stage: int
    dtype: str
    accumulation: int
    recompute: str = "none"
    offload: str = "none"

    @property
    def model(self) -> ModelSpec:
        return MODELS[self.name]

    @property
    def strategy(self) -> Strategy:
        return Strategy(
            zero_stage=self.stage, dtype=self.dtype, recompute=self.recompute, offload=self.offload, grad_clip=0.0,  # type: ignore[arg-type]
            bucket_bytes=20_000,
        )  # fmt: skip


CASES = [
    Case(name, world, stage, "fp32", 1 + stage % 2, ("none", "full", "selective", "none")[stage],
         ("none", "optimizer", "none", "optimizer,param")[stage])
    for name, world, stage in itertools.product(MODELS, (1, 2, 4), (0, 1, 2, 3))
] + [Case(name, 2, stage, "bf16", 2) for name, stage in itertools.product(MODELS, (0, 3))]  # fmt: skip
QUICK = {case for i, case in enumerate(CASES) if i in (5, 18, 31)}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[Case, Outcome]:
    """Every selected case, run once: one group of processes per world size."""
    wanted = [item.callspec.params["case"] for item in request.session.items if item.path == Path(__file__)]  # type: ignore[attr-defined]
    results: dict[Case, Outcome] = {}
    for world in sorted({case.world for case in wanted}):
        folder = tmp_path_factory.mktemp(f"experts{world}")
        run_ranks(worker, world, str(folder), [case for case in wanted if case.world == world])
        saved = torch.load(folder / "outcomes.pt")
        results |= {Case(*case): Outcome(*outcome) for case, outcome in saved.items()}
    return results


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow, id="-".join(map(str, c))) for c in CASES]
)
def test_training_equals_plain_pytorch(case: Case, trained: dict[Case, Outcome]) -> None:
    got, want, allowed = trained[case], run_plain(case), TOLERANCES[case.dtype]  # type: ignore[arg-type]
    assert len(got.losses) == 20 and got.losses[-1] < got.losses[0]
    assert relative_difference(got.params, want.params) <= (0.0 if case.world <= 2 else allowed.params)
    assert got.losses == pytest.approx(want.losses, rel=allowed.loss)
    job = tiny.job(case.model, case.strategy, world=case.world, n_micro_batches=case.accumulation)
    assert (got.bytes, got.calls) == traffic_of(lay_out(job).program)[:2]
