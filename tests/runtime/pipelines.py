"""Cases of pipelines for gloo processes and for the fake group."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from estimator.job import Job, ModelSpec, Strategy
from runtime import initialize
from runtime.models import Decoder, DecoderStage
from runtime.models.stage import stage_values
from runtime.reference import PARITY_OPTIMIZER, train_plain
from tests.runtime import tiny
from tests.runtime.groups import run_ranks
from tests.runtime.parity_worker import BATCH, SEQ, STEPS, Outcome, batch, gloo_group

MODELS = {"gpt": tiny.GPT, "llama": tiny.LLAMA, "qwen3": tiny.QWEN3}


class Case(NamedTuple):
    """A strategy by the values of its fields; ``n_layers`` blocks of a tiny model."""

    model: str
    n_layers: int
    world: int
    n_micro_batches: int
    fields: tuple[tuple[str, Any], ...]

    @property
    def spec(self) -> ModelSpec:
        return replace(MODELS[self.model], n_layers=self.n_layers)

    @property
    def strategy(self) -> Strategy:
        return Strategy(**{"bucket_bytes": 20_000, "grad_clip": 0.0, "dtype": "fp32", **dict(self.fields)})

    @property
    def dp(self) -> int:
        return self.world // self.strategy.pp

    def job(self) -> Job:
        return tiny.job(
            self.spec,
            self.strategy,
            world=self.world,
            n_micro_batches=self.n_micro_batches,
            micro_batch=BATCH,
            seq_len=SEQ,
        )


def case(model: str, n_layers: int, world: int, n: int, **fields: Any) -> Case:
    if fields.get("virtual_pp", 1) > 1:
        fields["pp_schedule"] = "interleaved_1f1b"
    return Case(model, n_layers, world, n, tuple(sorted(fields.items())))


def run_engine(case: Case, rank: int) -> Outcome:
    """Losses are those of the last stage's micro-batches, averaged over all data-parallel ranks."""
    stage, place = divmod(rank, case.dp)
    model = DecoderStage(case.spec, case.strategy, stage, micro_batch_size=BATCH, seq_len=SEQ).place("cpu")
    engine = initialize(
        model=model, strategy=case.strategy, n_micro_batches=case.n_micro_batches, optimizer=PARITY_OPTIMIZER,
        fill=stage_values(case.spec, torch.device("cpu")),
    )  # fmt: skip
    losses = []
    for _ in range(STEPS):
        of_step = engine.train_step([batch(micro, place) for micro in range(case.n_micro_batches)])
        total = sum(of_step, torch.zeros(()))
        torch.distributed.all_reduce(total)
        losses.append(total.item() / (case.n_micro_batches * case.dp))
    return Outcome(losses, engine.full_parameters(), dict(engine.comm.bytes), dict(engine.comm.calls))


def run_plain(case: Case) -> Outcome:
    model = Decoder(case.spec)
    model.reset_parameters(0)
    plain = train_plain(
        model, case.strategy, PARITY_OPTIMIZER, lambda _, rank, micro: batch(micro, rank), n_ranks=case.dp,
        n_micro_batches=case.n_micro_batches, steps=STEPS,
    )  # fmt: skip
    n = case.dp * case.n_micro_batches
    return Outcome([sum(map(sum, step)) / n for step in plain.losses], plain.params, {}, {})


def worker(rank: int, world: int, folder: str, cases: list[Case]) -> None:
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        outcomes = {case: run_engine(case, rank) for case in cases}
    torch.save({tuple(case): tuple(outcome) for case, outcome in outcomes.items()}, f"{folder}/{rank}.pt")


def train(world: int, cases: list[Case], folder: Path) -> list[dict[Case, Outcome]]:
    """By rank: every case over ``world`` gloo processes, which are started once."""
    run_ranks(worker, world, str(folder), cases)
    saved = [torch.load(folder / f"{rank}.pt") for rank in range(world)]
    return [{Case(*key): Outcome(*outcome) for key, outcome in of_rank.items()} for of_rank in saved]
