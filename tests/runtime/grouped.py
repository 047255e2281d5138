"""Cases of any strategy for gloo processes and for the fake group: parity, traffic and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp

from estimator.job import Job, ModelSpec, Strategy
from estimator.predict import lay_out, traffic_of
from tests.runtime import tiny
from tests.runtime.parity_worker import Outcome, worker


class Case(NamedTuple):
    """What ``parity_worker`` runs: a strategy by the values of its fields."""

    world: int
    accumulation: int
    fields: tuple[tuple[str, Any], ...]

    @property
    def model(self) -> ModelSpec:
        return tiny.GPT if self.accumulation == 1 else tiny.LLAMA

    @property
    def strategy(self) -> Strategy:
        return Strategy(**{"bucket_bytes": 20_000, "grad_clip": 0.0, **dict(self.fields)})

    @property
    def job(self) -> Job:
        return tiny.job(self.model, self.strategy, world=self.world, n_micro_batches=self.accumulation)


def case(world: int, accumulation: int = 1, **fields: Any) -> Case:
    return Case(world, accumulation, tuple(sorted(fields.items())))


def train(world: int, cases: list[Case], folder: Path) -> dict[Case, Outcome]:
    """Every case over ``world`` gloo processes, which are started once."""
    mp.spawn(worker, (world, str(folder), cases), nprocs=world)
    saved = torch.load(folder / "outcomes.pt")
    return {Case(*key): Outcome(*outcome) for key, outcome in saved.items()}


def assert_traffic_is_forecast(case: Case, outcome: Outcome) -> None:
    n_bytes, calls, _ = traffic_of(lay_out(case.job).program)
    assert (outcome.bytes, outcome.calls) == (n_bytes, calls)


def joined(outcome: Outcome) -> torch.Tensor:
    return torch.cat([param.flatten() for param in outcome.params.values()])
