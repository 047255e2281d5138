"""Random products of what a ``Strategy`` can say, really trained: as plain PyTorch trains, with the forecast's bytes.

Every product trains 20 steps on every one of its processes. ``AXES`` says how its ranks work together, in turn; ``CHOICES`` is the
table to which a new field is added (values that change nothing on purpose are in it several times). A product that ``Strategy`` or
``Job`` refuses is drawn again. What is inexact by design (quantised gathers, compression) has tests of its own.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy
from estimator.predict import lay_out, memory_of, traffic_of
from runtime.reference import tolerance
from tests.runtime import tiny
from tests.runtime.memory import MODELS, compare
from tests.runtime.sessions import STEPS, Found, measured, train
from tests.runtime.test_expert_parallel import with_capacity
from tests.runtime.test_experts_memory import MODELS as EXPERTS

SPECS: dict[str, ModelSpec] = {
    **MODELS,
    **{name: with_capacity(EXPERTS[name], 1.25) for name in ("mixtral", "qwen-moe", "deepseek-v3")},
}
"""With a capacity, so that nothing depends on what routers choose."""
SERVERS = {"sync": "parameter_server"}
ZERO_BUBBLE = {"pp_schedule": "zero_bubble"}
INTERLEAVED = {"pp_schedule": "interleaved_1f1b", "virtual_pp": 2}
AXES: dict[int, tuple[dict[str, Any], ...]] = {
    1: ({}, {}, SERVERS),
    2: (
        {}, {"tp": 2}, {"pp": 2}, {"cp": 2}, {"ep": 2}, {**SERVERS, "n_servers": 2}, {}, {"tp": 2, "sequence_parallel": False},
        {"pp": 2, **ZERO_BUBBLE}, {"cp": 2, "cp_kind": "ring"}, {**SERVERS, "staleness": 1}, {"pp": 2, **INTERLEAVED},
    ),
    4: (
        {}, {"shard_size": 2}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"cp": 2, "pp": 2}, {"ep": 2}, {"tp": 2, "ep": 2},
        {"pp": 2, "ep": 2}, {"tp": 2, "cp": 2}, {**SERVERS, "n_servers": 3}, {"pp": 2, **ZERO_BUBBLE}, {"pp": 4, "pp_schedule": "gpipe"},
        {"secondary_shard": 2}, {"cp": 2, "cp_kind": "ring"}, {"pp": 2, "tp": 2, **ZERO_BUBBLE}, {"pp": 2, **INTERLEAVED},
        {**SERVERS, "n_servers": 2, "staleness": 1}, {"ep": 4}, {"cp": 2, "pp": 2, "cp_kind": "ring"}, {"pp": 4, **ZERO_BUBBLE}, {"tp": 4},
    ),
    8: (
        {"tp": 2, "pp": 2, "ep": 2}, {"tp": 2, "cp": 2, "pp": 2}, {"pp": 2, "shard_size": 2}, {"tp": 2, "ep": 4, "zero_stage": 1},
        {"tp": 2, "pp": 2, **ZERO_BUBBLE}, {"cp": 2, "shard_size": 2},
    ),
}  # fmt: skip
"""By number of processes: fields that a product has whatever else is drawn."""
CHOICES: dict[str, tuple[Any, ...]] = {
    "model": tuple(SPECS),
    "micro_batch": (1, 2, 3),
    "n_micro_batches": (1, 2, 3),
    "zero_stage": (0, 1, 2, 3, 3),
    "offload": ("none", "none", "optimizer", "optimizer,param"),
    "offload_fraction": (1.0, 1.0, 0.3),
    "recompute": ("none", "selective", "full", "activation,norms", "attention", "attention,mlp,norms"),
    "recompute_every": (1, 1, 2),
    "activation_offload": (False, False, True),
    "dtype": ("fp32", "fp32", "bf16", "fp16"),
    "grad_dtype": ("model", "fp32"),
    "master_dtype": ("fp32", "fp32", "model"),
    "state_dtype": ("fp32", "fp32", "fp32", "model"),
    "optimizer": ("adamw", "adam", "sgd"),
    "sequence_parallel": (True, False),
    "shard_size": (0, 0, 2),
    "bucket_bytes": (1, 50_000, 400_000, 64 << 20),
    "persistent_numel": (0, 0, 200, 20_000),
    "prefetch_depth": (0, 1, 2, 5),
    "grad_clip": (0.0, 0.0, 0.5, 1.0),
}
NUMBER = {1: 12, 2: 24, 4: 22, 8: 6}
"""Products by number of processes: 64."""
QUICK = {1: 1, 2: 2, 4: 1, 8: 0}
"""Those of the quick run: the ones with the smallest batches."""

Values = dict[str, Any]


def job_of(values: Values, world: int) -> Job:
    fields = {f.name for f in dataclasses.fields(Strategy)}
    spec = SPECS[values["model"]]
    dtype = "fp32" if spec.experts else values["dtype"]  # routers turn the rounding of 16 bits into other choices
    strategy = Strategy(**{name: value for name, value in values.items() if name in fields} | {"dtype": dtype})
    if spec.experts and strategy.cp > 1:
        raise InputError("ranks that share sequences balance, and drop, of their own tokens: not as one rank does")
    rest = {name: values[name] for name in ("micro_batch", "n_micro_batches")}
    spec = replace(spec, n_layers=max(spec.n_layers, strategy.pp * strategy.virtual_pp))
    return tiny.job(spec, strategy, world=world, seq_len=16, arch="cpu", **rest)


@cache
def _drawn(world: int, number: int) -> Job:
    chance = random.Random(f"{world} processes, product {number}")
    axes = AXES[world][number % len(AXES[world])]
    while True:
        try:
            return job_of({name: chance.choice(values) for name, values in CHOICES.items()} | axes, world)
        except InputError:
            continue


def says(job: Job) -> str:
    """What is not at its default."""
    chosen = {f.name: getattr(job.strategy, f.name) for f in dataclasses.fields(Strategy)}
    default = {f.name: f.default for f in dataclasses.fields(Strategy)}
    differs = ", ".join(f"{name}={value}" for name, value in chosen.items() if value != default[name])
    return f"{job.model.name}, {job.cluster.n_gpus} ranks, {job.workload}, {differs}"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[tuple[int, int], Found]:
    """By product, what each rank found: one group of processes per world size runs all products that are selected."""
    wanted = [
        (item.callspec.params["world"], item.callspec.params["number"])
        for item in request.session.items
        if item.path == Path(__file__) and "trained" in item.fixturenames  # type: ignore[attr-defined]
    ]
    results: dict[tuple[int, int], Found] = {}
    for world in sorted({world for world, _ in wanted}):
        folder, numbers = tmp_path_factory.mktemp(f"world{world}"), [n for w, n in wanted if w == world]
        found = train([_drawn(world, number) for number in numbers], folder)
        results |= {(world, number): of_job for number, of_job in zip(numbers, found, strict=True)}
    return results


def _products() -> Iterator[Any]:
    for world, count in NUMBER.items():
        by_size = sorted(range(count), key=lambda n: _drawn(world, n).workload.global_batch_size)
        quick = by_size[: QUICK[world]]
        for number in range(count):
            yield pytest.param(world, number, marks=() if number in quick else pytest.mark.slow)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("world", "number"), list(_products()))
def test_a_product_trains_as_plain_pytorch_with_the_forecast_bytes(
    world: int, number: int, trained: dict[tuple[int, int], Found]
) -> None:
    job, found = _drawn(world, number), trained[world, number]
    print(says(job))  # pytest shows it when the test fails
    ranks, s = measured(found), job.strategy
    parity, allowed = ranks[0].parity, tolerance(s.dtype, s.n_summands)
    if keeps_order(job):
        assert parity["params"] == 0
    assert parity["params"] <= allowed.params and parity["loss"] <= allowed.loss
    assert ranks[0].skipped_steps < STEPS / 2
    for number, rank in enumerate(ranks):
        is_server = job.mesh.data_place(number) < s.n_servers
        blueprint = lay_out(job, job.mesh.place("pp", number), is_server=is_server)
        forecast = memory_of(blueprint)
        assert (rank.collective_bytes, rank.collective_calls, rank.copy_bytes) == traffic_of(
            blueprint.program, blueprint.costs
        )
        if job.model.experts is None:
            assert rank.category_peak_bytes == pytest.approx(forecast.category_peak_bytes, rel=0, abs=16)  # scalars
        compare(rank, forecast)


def keeps_order(job: Job) -> bool:
    """Whether every sum has plain PyTorch's order: not a norm's terms, nor the products of ranks that share layers or sequences, nor
    the gradients of a table that two stages hold."""
    s = job.strategy
    two_tables = s.pp > 1 and job.model.tied_embeddings
    return job.cluster.n_gpus <= 2 and s.tp == s.cp == s.ep == 1 and not s.grad_clip and not two_tables


def test_there_are_at_least_sixty_products_and_every_choice_takes_its_turn() -> None:
    jobs = [_drawn(world, number) for world, count in NUMBER.items() for number in range(count)]
    assert len({job.key for job in jobs}) == len(jobs) >= 60
    for name, values in CHOICES.items():
        if name in {f.name for f in dataclasses.fields(Strategy)}:
            assert {getattr(job.strategy, name) for job in jobs} >= set(values), name
    assert {job.model.name for job in jobs} == {spec.name for spec in SPECS.values()}
    for world, axes in AXES.items():
        assert NUMBER[world] >= len(axes)
