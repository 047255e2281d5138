"""Pipelines train as one process of plain PyTorch does, and send and hold what the forecast says, on every stage."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.predict import lay_out, memory_of, traffic_of
from estimator.schedule.events import Recv, Send
from runtime import initialize
from runtime.comm import Communicator
from runtime.models import Decoder, DecoderStage
from runtime.models.stage import stage_values
from runtime.reference import relative_difference
from runtime.session import Measurement, SessionOptions, run_session
from tests.runtime import tiny
from tests.runtime.groups import run_ranks
from tests.runtime.memory import MODELS as WIDE
from tests.runtime.memory import compare
from tests.runtime.parity_worker import Outcome, gloo_group
from tests.runtime.pipelines import Case, case, run_plain, train
from tests.runtime.test_fake_cpu import MEMORY

pytestmark = pytest.mark.timeout(1200)

QUICK = [
    case("llama", 4, 2, 4, pp=2),
    case("gpt", 3, 2, 3, pp=2, pp_schedule="gpipe", grad_clip=0.5),
    case("llama", 4, 2, 4, pp=2, pp_schedule="zero_bubble"),
]
SLOW = [
    case("llama", 5, 2, 4, pp=2, virtual_pp=2, recompute="full"),
    case("gpt", 4, 4, 5, pp=4, zero_stage=3),
    case("gpt", 2, 4, 3, pp=2, zero_stage=1, grad_clip=0.5),
    case("llama", 4, 4, 2, pp=2, zero_stage=3, virtual_pp=2),
    *(case("llama", 4, 4, 4, pp=4, pp_schedule=schedule) for schedule in ("gpipe", "1f1b")),
    case("gpt", 8, 4, 4, pp=4, virtual_pp=2),
    case("llama", 7, 4, 8, pp=4, pp_layers=(1, 2, 3, 1)),
    *(
        case(model, 5, 4, 4, pp=2, zero_stage=stage, grad_clip=0.5, **more)
        for stage, (model, more) in itertools.product(
            (0, 1, 2, 3), (("llama", {"virtual_pp": 2}), ("gpt", {"recompute": "selective"}))
        )
    ),
    case("gpt", 2, 4, 4, pp=2, zero_stage=2, offload="optimizer"),
    case("llama", 2, 4, 4, pp=2, zero_stage=3, offload="optimizer,param"),
    case("qwen3", 4, 4, 1, pp=4, zero_stage=1),
    case("llama", 6, 4, 6, pp=4, pp_schedule="zero_bubble"),
    case("gpt", 3, 4, 4, pp=2, pp_schedule="zero_bubble", zero_stage=1, grad_clip=0.5, recompute="full"),
    case("gpt", 3, 2, 3, pp=2, pp_schedule="zero_bubble", offload="optimizer", recompute="selective"),
    case("qwen3", 3, 2, 5, pp=2, pp_schedule="zero_bubble", recompute="activation,norms"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[Case, list[Outcome]]:
    """By rank, of every selected case: one group of processes per world size."""
    wanted = {
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == Path(__file__) and "outcomes" in item.fixturenames  # type: ignore[attr-defined]
    }
    found: dict[Case, list[Outcome]] = {}
    for world in sorted({c.world for c in wanted}):
        cases = [c for c in (*QUICK, *SLOW) if c in wanted and c.world == world]
        by_rank = train(world, cases, tmp_path_factory.mktemp(f"world{world}"))
        found |= {c: [of_rank[c] for of_rank in by_rank] for c in cases}
    return found


@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)], ids=str)
def test_training_equals_plain_pytorch_and_sends_what_is_forecast(
    case: Case, outcomes: dict[Case, list[Outcome]]
) -> None:
    """Without data parallelism and tied tables nothing is added in another order: equal bit by bit."""
    got, want = outcomes[case], run_plain(case)
    assert len(want.losses) == 20 and want.losses[-1] < want.losses[0]
    for rank, outcome in enumerate(got):
        assert outcome.params.keys() == want.params.keys()
        assert relative_difference(outcome.params, want.params) <= 1e-5
        assert outcome.losses == pytest.approx(want.losses, rel=1e-5)
        n_bytes, calls, _ = traffic_of(lay_out(case.job(), rank // case.dp).program)
        assert (outcome.bytes, outcome.calls) == (n_bytes, calls)
        assert n_bytes["send"] > 0
    if case.dp == 1 and case.model == "llama" and not case.strategy.grad_clip:
        assert all(torch.equal(got[0].params[name], want.params[name]) for name in want.params)


# ---- live bytes -----------------------------------------------------------------------------------------------------

SCHEDULES: tuple[dict[str, Any], ...] = ({"pp_schedule": "gpipe"}, {}, {"virtual_pp": 2})
RECOMPUTES, DTYPES = ("none", "selective", "full"), ("bf16", "fp32", "fp16")
GRID = [
    (model, stage, SCHEDULES[i % 3], RECOMPUTES[i // 3 % 3], DTYPES[(i + stage) % 3], (2, 3, 4)[i // 2 % 3])
    for i, (model, stage) in enumerate(itertools.product([*WIDE, *WIDE], (0, 1, 2, 3)))
]


def metered(job: Job, rank: int, device: str = "meta") -> Measurement:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=job.cluster.n_gpus)
    try:
        return run_session(job, device, SessionOptions(steps=1, warmup=1), rank=rank)  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("args", [pytest.param(a, marks=() if i % 4 == i // 10 else pytest.mark.slow) for i, a in enumerate(GRID)],
                         ids=lambda a: "-".join(map(str, a)))  # fmt: skip
def test_live_bytes_of_every_stage(args: tuple) -> None:
    model, stage, schedule, recompute, dtype, pp = args
    strategy = Strategy(
        pp=pp, zero_stage=stage, recompute=recompute, dtype=dtype, bucket_bytes=300_000,
        **(schedule if "virtual_pp" not in schedule else {**schedule, "pp_schedule": "interleaved_1f1b"}),
    )  # fmt: skip
    spec = replace(WIDE[model], n_layers=pp * 2 + 1)
    job = tiny.job(spec, strategy, world=2 * pp, n_micro_batches=2 * pp, micro_batch=4, seq_len=64)
    for place in range(pp):
        got, blueprint = metered(job, 2 * place + place % 2), lay_out(job, place)
        compare(got, memory_of(blueprint))
        assert traffic_of(blueprint.program)[:2] == (got.collective_bytes, got.collective_calls)


LATE = [
    (model, recompute, more)
    for model, recompute, more in zip(
        [*WIDE, *WIDE], ("none", "full", "selective", "activation,norms", "attention,mlp", "none"),
        ({}, {"zero_stage": 1}, {"kernels_off": ("all",)}, {"tp": 2, "sequence_parallel": False}, {"tp": 2}, {"dtype": "fp32"}),
        strict=False,
    )
]  # fmt: skip


@pytest.mark.parametrize("args", LATE, ids=lambda a: "-".join(map(str, a)))
@pytest.mark.parametrize("pp", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_live_bytes_where_gradients_of_weights_come_later(args: tuple, pp: int) -> None:
    """What linear layers hold until then, and no more."""
    model, recompute, more = args
    fields = {"pp": pp, "pp_schedule": "zero_bubble", "recompute": recompute, "bucket_bytes": 300_000, **more}
    spec = replace(WIDE[model], n_layers=pp * 2 + 1, n_kv_heads=max(2, WIDE[model].n_kv_heads))
    job = tiny.job(spec, Strategy(**fields), world=4 * pp, n_micro_batches=2 * pp, micro_batch=4, seq_len=64)
    for place in range(pp):
        got, blueprint = metered(job, 4 * place + 1), lay_out(job, place)
        compare(got, memory_of(blueprint))
        assert traffic_of(blueprint.program, blueprint.costs)[:2] == (got.collective_bytes, got.collective_calls)


def test_offloaded_states_of_a_stage() -> None:
    for offload in ("optimizer", "optimizer,param"):
        strategy = Strategy(pp=2, zero_stage=2, offload=offload, dtype="bf16")  # type: ignore[arg-type]
        job = tiny.job(WIDE["gpt"], strategy, world=4, n_micro_batches=3, micro_batch=4, seq_len=64)
        for place in (0, 1):
            got, blueprint = metered(job, 2 * place), lay_out(job, place)
            compare(got, memory_of(blueprint))
            assert traffic_of(blueprint.program)[2] == got.copy_bytes


def _real_rank(rank: int, world: int, folder: str, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        results = [
            asdict(run_session(job, "cpu", SessionOptions(steps=2, warmup=1, reference=True), rank=rank))
            for job in jobs
        ]
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


@pytest.mark.slow
def test_fake_equals_cpu_to_the_byte_and_a_session_trains_as_plain_pytorch(tmp_path: Path) -> None:
    jobs = [
        tiny.job(replace(tiny.GPT, n_layers=3), Strategy(pp=2, dtype="fp32", zero_stage=1), world=2, n_micro_batches=3, arch="cpu"),
        tiny.job(
            replace(tiny.LLAMA, n_layers=4), Strategy(pp=2, dtype="fp32", virtual_pp=2, pp_schedule="interleaved_1f1b"),
            world=2, n_micro_batches=4, arch="cpu",
        ),
        tiny.job(
            replace(tiny.LLAMA, n_layers=4), Strategy(pp=2, dtype="fp32", pp_schedule="zero_bubble", recompute="full"),
            world=2, n_micro_batches=4, arch="cpu",
        ),
    ]  # fmt: skip
    run_ranks(_real_rank, 2, str(tmp_path), jobs)
    real = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for i, job in enumerate(jobs):
        for rank in range(2):
            fake = asdict(metered(job, rank, "fake-cpu"))
            assert {name: fake[name] for name in MEMORY} == {name: real[rank][i][name] for name in MEMORY}
        assert real[0][i]["losses"] == real[1][i]["losses"] and len(real[0][i]["losses"]) == 2
        assert max(real[0][i]["parity"].values()) < 1e-5
        assert real[1][i]["part_seconds"]["pipeline_bubble"] > 0


# ---- the model of a stage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", tiny.ALL, ids=lambda spec: spec.name)
def test_any_layout_begins_with_the_same_values(spec) -> None:
    whole = Decoder(spec)
    whole.reset_parameters(3)
    wanted = {**dict(whole.named_parameters()), "head.out.weight": whole.head.out.weight}
    for fields in ({"pp": 2}, {"pp": 1 if spec.n_layers < 2 else 2, "pp_layers": (1, 1)}):
        held = set()
        for rank in range(2):
            stage = DecoderStage(spec, Strategy(**fields), rank, micro_batch_size=1).place("cpu")
            stage.reset_parameters(3)
            for name, param in stage.named_parameters():
                assert torch.equal(param, wanted[name])
                held.add(name)
        assert held == set(wanted)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="pp is 2; allowed: a divisor of the 1 ranks"):
        initialize(model=Decoder(tiny.LLAMA), strategy=Strategy(pp=2))
    stage = DecoderStage(tiny.LLAMA, Strategy(pp=2), 0, micro_batch_size=1).place("cpu")
    with pytest.raises(InputError, match="pp is 1, but the model is a stage of a pipeline"):
        initialize(model=stage, strategy=Strategy(), fill=stage_values(tiny.LLAMA, torch.device("cpu")))
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with pytest.raises(InputError, match="pp is 2, but the model is no stage"):
            initialize(model=torch.nn.Sequential(torch.nn.Linear(2, 2)), strategy=Strategy(pp=2))
        with pytest.raises(InputError, match="the model is stage 0 of 2; allowed on this rank: 1 of 2"):
            initialize(model=stage, strategy=Strategy(pp=2))
        last = DecoderStage(tiny.LLAMA, Strategy(pp=2, dtype="fp32"), 1, micro_batch_size=2, seq_len=8).place("cpu")
        engine = initialize(
            model=last, strategy=Strategy(pp=2, dtype="fp32"), n_micro_batches=2,
            fill=stage_values(tiny.LLAMA, torch.device("cpu")),
        )  # fmt: skip
        with pytest.raises(RuntimeError, match=r"engine\.train_step"):
            engine(torch.zeros(2, 8, dtype=torch.int64))
        with pytest.raises(InputError, match="train_step was given 1 micro-batches; allowed: 2"):
            engine.train_step([(None, None)])
        with pytest.raises(InputError, match=r"a micro-batch is None; allowed: \(2, 8\)"):
            engine.train_step([(None, None)] * 2)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("pp", [2, 3, 4, 5])
@pytest.mark.parametrize("virtual_pp", [1, 2])
def test_on_nccl_each_kind_and_direction_of_message_has_a_group(
    pp: int, virtual_pp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank makes as many groups, each in the same turn as the other rank in it; all messages find theirs."""
    fields: dict[str, Any] = {"pp_schedule": "interleaved_1f1b", "virtual_pp": 2} if virtual_pp > 1 else {}
    job = tiny.job(replace(tiny.LLAMA, n_layers=10), Strategy(pp=pp, **fields), world=pp, n_micro_batches=pp)
    turns: list[list[list[int]]] = []
    for rank in range(job.cluster.n_gpus):
        comm = Communicator.__new__(Communicator)
        comm.rank, comm.mesh, comm._own_streams, comm._links, comm._timeout = rank, job.mesh, True, {}, None
        made: list[list[int]] = []
        monkeypatch.setattr(dist, "new_group", lambda ranks, made=made, **_: made.append(ranks))
        comm.join_peers(1, is_ring=virtual_pp > 1)
        turns.append(made)
        for section in lay_out(job, rank).program.step:
            for event in section.events:
                if isinstance(event, Send):
                    assert (event.what, rank, rank + event.offset) in comm._links
                elif isinstance(event, Recv):
                    assert (event.what, rank + event.offset, rank) in comm._links
    assert len({len(made) for made in turns}) == 1
    for turn in zip(*turns, strict=True):
        for rank, ranks in enumerate(turn):
            assert rank in ranks and all(turn[other] == ranks for other in ranks)
