"""Parameter servers: the same training as plain PyTorch's, late by the staleness; traffic and memory as forecast."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.job.job import young_choices
from estimator.predict import lay_out, memory_of, traffic_of
from runtime import OptimizerConfig, initialize
from runtime.models import Decoder
from runtime.reference import TOLERANCES, relative_difference, train_plain
from runtime.session import Measurement, SessionOptions, run_session
from tests.runtime import tiny
from tests.runtime.grouped import Case, assert_traffic_is_forecast, case, joined
from tests.runtime.groups import run_ranks
from tests.runtime.memory import MODELS, check, compare, metered
from tests.runtime.parity_worker import Outcome, batch, gloo_group, run_plain, worker

pytestmark = pytest.mark.timeout(600)


def served(world: int, accumulation: int = 1, **fields: object) -> Case:
    return case(world, accumulation, sync="parameter_server", **fields)


BY_WORLD = {
    world: [
        served(world, 1 + (staleness + n_servers) % 2, n_servers=n_servers, staleness=staleness, dtype=dtype)
        for n_servers, staleness, dtype in itertools.product((1, 2), (0, 1, 2), ("fp32", "bf16"))
        if n_servers <= world
    ]
    for world in (1, 2, 4)
}
BY_WORLD[2] += [
    served(2, 2, n_servers=2, staleness=1, dtype="bf16", master_dtype="model", state_dtype="model"),
    served(2, 2, n_servers=1, staleness=1, dtype="bf16", grad_dtype="fp32"),
]
ROUNDED = [
    served(2, 2, n_servers=2, staleness=1, dtype="bf16", grad_clip=0.5, recompute="full"),
    served(2, 2, n_servers=1, dtype="fp16", grad_clip=0.5),
    served(2, 1, n_servers=1, dtype="fp16", optimizer="sgd"),
]
EXACT = [c for cases in BY_WORLD.values() for c in cases]


QUICK = {
    (1, 1, 1, "fp32"),
    (2, 1, 0, "bf16"),
    (2, 2, 1, "fp32"),
}
"""World, servers, staleness and dtype of the cases of every run."""


def selected(cases: list[Case]) -> list:
    return [pytest.param(c, marks=() if _is_quick(c) else pytest.mark.slow, id=str(c)) for c in cases]


def _is_quick(c: Case) -> bool:
    s = c.strategy
    return c in ROUNDED[1:2] or (c.world, s.n_servers, s.staleness, s.dtype) in QUICK


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[Case, Outcome]:
    """Every selected case, run once: one group of processes per world size."""
    wanted = {
        item.callspec.params["served"]
        for item in request.session.items
        if item.module is request.module and "outcomes" in getattr(item, "fixturenames", ())  # type: ignore[attr-defined]
    }
    results: dict[Case, Outcome] = {}
    for world in sorted({c.world for c in wanted}):
        folder = tmp_path_factory.mktemp("servers")
        run_ranks(worker, world, str(folder), sorted(c for c in wanted if c.world == world))
        saved = torch.load(folder / "outcomes.pt")
        results |= {Case(*key): Outcome(*outcome) for key, outcome in saved.items()}
    return results


@pytest.mark.parametrize("served", selected(EXACT))
def test_training_is_bit_equal_to_plain_pytorch(served: Case, outcomes: dict[Case, Outcome]) -> None:
    """Servers add up in the order of ranks, so that four ranks are as exact as two."""
    got, want = outcomes[served], run_plain(served)
    assert torch.equal(joined(got), joined(want))
    assert got.losses == pytest.approx(want.losses, rel=1e-6) and got.losses[-1] < got.losses[0]


@pytest.mark.parametrize("served", selected(ROUNDED))
def test_clipping_and_fp16_equal_plain_pytorch_within_rounding(served: Case, outcomes: dict[Case, Outcome]) -> None:
    got, want, allowed = outcomes[served], run_plain(served), TOLERANCES[served.strategy.dtype]
    assert relative_difference(got.params, want.params) <= allowed.params
    assert got.losses == pytest.approx(want.losses, rel=allowed.loss)


@pytest.mark.parametrize("served", selected([*EXACT, *ROUNDED]))
def test_bytes_on_the_wire_are_the_forecast(served: Case, outcomes: dict[Case, Outcome]) -> None:
    assert_traffic_is_forecast(served, outcomes[served])
    assert ("push" in outcomes[served].bytes) == (served.world > 1)


def test_late_gradients_still_learn() -> None:
    """What exact training reaches in 60 steps of AdamW (0.26), a step late reaches within 0.5, two steps late within 1.1."""
    last = []
    for staleness in (0, 1, 2):
        model = Decoder(tiny.GPT)
        model.reset_parameters(0)
        strategy = Strategy(dtype="fp32", grad_clip=0.0, sync="parameter_server", staleness=staleness)
        plain = train_plain(
            model, strategy, OptimizerConfig(lr=3e-3), lambda _, rank, micro: batch(micro, rank), n_ranks=2,
            n_micro_batches=1, steps=60,
        )  # fmt: skip
        last.append(sum(loss for rank in plain.losses[-1] for loss in rank) / 2)
    assert last[0] < 0.4 and last[1] < last[0] + 0.5 and last[2] < last[0] + 1.1


# ---- memory ---------------------------------------------------------------------------------------------------------


def job(world: int, n_servers: int, staleness: int, *, arch: str = "hopper", n: int = 2, **fields: object) -> Job:
    strategy = Strategy(
        sync="parameter_server", n_servers=n_servers, staleness=staleness, **{"bucket_bytes": 300_000, **fields},  # type: ignore[arg-type]
    )  # fmt: skip
    model, seq_len = (tiny.LLAMA, 16) if arch == "cpu" else (MODELS["llama"], 64)
    return tiny.job(model, strategy, world=world, n_micro_batches=n, seq_len=seq_len, arch=arch)


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize(("n_servers", "rank"), [(1, 0), (1, 7), (3, 2), (3, 3), (8, 7)])
def test_live_bytes_of_servers_and_workers_are_the_forecast(n_servers: int, rank: int, staleness: int) -> None:
    dtype = ("bf16", "fp32", "fp16" if staleness == 0 else "bf16")[(n_servers + rank) % 3]
    got = check(job(8, n_servers, staleness, dtype=dtype, recompute=("none", "full")[rank % 2]), rank)
    assert ("optimizer_state" in got.category_peak_bytes) == (rank < n_servers)


@pytest.mark.parametrize("fields", [
    {"kernels_off": ("all",)}, {"grad_dtype": "fp32"}, {"master_dtype": "model", "state_dtype": "model"}, {"optimizer": "sgd"},
    {"grad_clip": 0.0, "bucket_bytes": 1},
], ids=str)  # fmt: skip
def test_live_bytes_with_other_choices(fields: dict[str, object]) -> None:
    for rank in (0, 3):
        check(job(4, 2, 1, n=1, **fields), rank)


def test_one_rank_is_its_own_server() -> None:
    for staleness in (0, 2):
        assert check(job(1, 1, staleness)).collective_bytes == {}


CPU_JOBS = {
    world: [
        job(world, n_servers, staleness, arch="cpu", dtype=dtype, bucket_bytes=20_000)
        for n_servers, staleness, dtype in choices
    ]
    for world, choices in {
        2: [(1, 0, "bf16"), (2, 1, "fp32")],
        4: [(1, 2, "bf16"), (2, 0, "fp32"), (3, 1, "bf16")],
    }.items()
}


def real_rank(rank: int, world: int, folder: str, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    with gloo_group(rank, world, folder):
        results = [asdict(run_session(job, "cpu", SessionOptions(steps=1, warmup=1), rank=rank)) for job in jobs]
    Path(folder, f"{rank}.json").write_text(json.dumps(results))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_live_bytes_over_gloo_are_the_forecast(world: int, tmp_path: Path) -> None:
    """On every rank; and the wire carries what is forecast."""
    run_ranks(real_rank, world, str(tmp_path), CPU_JOBS[world])
    for rank in range(world):
        for job, got in zip(CPU_JOBS[world], json.loads((tmp_path / f"{rank}.json").read_text()), strict=True):
            blueprint = lay_out(job, is_server=rank < job.strategy.n_servers)
            measured = Measurement(**got)
            compare(measured, memory_of(blueprint))
            assert (measured.collective_bytes, measured.collective_calls) == traffic_of(blueprint.program)[:2]
            fake = metered(job, "fake-cpu", rank)
            assert (fake.category_peak_bytes, fake.peak_allocated_bytes) == (
                measured.category_peak_bytes, measured.peak_allocated_bytes,
            )  # fmt: skip


def test_every_step_of_staleness_holds_another_copy_of_the_gradients() -> None:
    """6 bytes per parameter of a server's 8 ranks and 2 servers: its own 2, and what 7 ranks push of half the model at 2 each."""
    at = [memory_of(lay_out(job(8, 2, staleness, bucket_bytes=1))) for staleness in (0, 1, 2)]
    grads = sum(g.padded_numel for g in lay_out(job(8, 2, 0, bucket_bytes=1)).layout.groups) * 2
    held = [m.phase_category_bytes["init"] for m in at]
    assert "reduce_buckets" not in held[0] and "grads" not in held[0]
    for staleness in (1, 2):
        assert held[staleness]["grads"] == staleness * grads
        assert held[staleness]["reduce_buckets"] == staleness * 7 * grads // 2


# ---- single things --------------------------------------------------------------------------------------------------


def test_the_first_steps_end_without_an_update_and_reading_parameters_changes_nothing() -> None:
    engine, plain = (
        initialize(
            model=Decoder(tiny.GPT), optimizer=OptimizerConfig(lr=1e-3),
            strategy=Strategy(dtype="fp32", sync="parameter_server", staleness=2),
        )
        for _ in range(2)
    )  # fmt: skip
    for e in (engine, plain):
        e.model.load_state_dict(engine.model.state_dict())
    before = {name: p.clone() for name, p in engine.full_parameters().items()}
    for step in range(4):
        for e in (engine, plain):
            e.backward(e(*batch(step, 0)))
            e.step()
        now = engine.full_parameters()
        assert all(torch.equal(now[name], before[name]) for name in before) == (step < 2)
    assert engine.executor._step_counts["compute"].item() == 2
    assert all(torch.equal(p, now[name]) for name, p in plain.full_parameters().items())
    engine.close()


def test_gradients_that_are_not_finite_are_named_on_every_rank() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        model = Decoder(tiny.GPT)
        engine = initialize(model=model, strategy=Strategy(dtype="fp32", sync="parameter_server"))
        engine.check_gradients = True
        engine.backward(engine(*batch(0, 0)))
        assert engine.step() and engine.nonfinite_gradients == []  # a worker leaves it to the server
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"sync": "server"}, "sync is 'server'; allowed: allreduce, parameter_server; did you mean 'parameter_server'?"),
        ({"n_servers": 2}, "n_servers is 2 and staleness 0 with sync 'allreduce'; allowed: 1 and 0"),
        ({"staleness": 1}, "n_servers is 1 and staleness 1 with sync 'allreduce'; allowed: 1 and 0"),
        ({"n_servers": 0}, "n_servers is 0; allowed: "),
        ({"staleness": -1, "sync": "parameter_server"}, "staleness is -1; allowed: "),
        ({"sync": "parameter_server", "zero_stage": 1}, "sync is 'parameter_server' with zero 1 and offload 'none'; allowed: zero 0"),
        ({"sync": "parameter_server", "offload": "optimizer"}, "with zero 0 and offload 'optimizer'; allowed: zero 0 and offload 'none'"),
        ({"sync": "parameter_server", "grad_compression": "one_bit"}, "with grad_compression 'one_bit' and sparse_embeddings False"),
        ({"sync": "parameter_server", "tp": 2}, "with tp 2, pp 1, cp 1 and ep 1; allowed: 1 for each"),
        ({"sync": "parameter_server", "staleness": 1, "dtype": "fp16"}, "staleness is 1 with dtype 'fp16'; allowed: 0, or dtype"),
        ({"sync": "parameter_server", "n_servers": 5}, "n_servers is 5; allowed: at most 4, the data-parallel GPUs"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        tiny.job(tiny.GPT, Strategy(**fields), world=4)  # type: ignore[arg-type]
    assert sentence in str(error.value)


def test_keys_of_jobs_without_servers_stay() -> None:
    assert young_choices(Strategy(sync="allreduce")) == {} != young_choices(Strategy(sync="parameter_server"))
    assert job(2, 2, 1).key != job(2, 2, 0).key != job(2, 1, 0).key
