"""Groups of ranks that share one sharded copy: the same training, the forecast's bytes, an outer sum once per step."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from estimator.errors import InputError
from estimator.job import Strategy
from estimator.job.mesh import Span
from estimator.predict import lay_out
from estimator.schedule.events import Alloc, Collective
from runtime.comm import Communicator
from runtime.reference import TOLERANCES, relative_difference
from tests.runtime import tiny
from tests.runtime.grouped import Case, assert_traffic_is_forecast, case, joined, train
from tests.runtime.memory import MODELS, check, metered
from tests.runtime.parity_worker import Outcome, run_plain

pytestmark = pytest.mark.timeout(600)

CASES = [
    case(4, accumulation, zero_stage=stage, dtype="fp32", shard_size=2, offload=offload)
    for stage, (accumulation, offload) in itertools.product(
        (1, 2, 3), ((1, "none"), (3, "optimizer"), (2, "none"), (1, "optimizer,param"))
    )
]
EXACT = [c for c in CASES if c.accumulation < 3]
ROUNDED = [
    *(c for c in CASES if c.accumulation == 3),
    case(4, 2, zero_stage=3, dtype="bf16", shard_size=2, grad_clip=0.5, recompute="full"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    return train(4, [*EXACT, *ROUNDED], tmp_path_factory.mktemp("hybrid"))


@pytest.mark.slow  # four processes train
@pytest.mark.parametrize("hybrid", EXACT, ids=str)
def test_two_groups_of_two_are_bit_equal_to_plain_pytorch(hybrid: Case, outcomes: dict[Case, Outcome]) -> None:
    """Every sum has two terms, inside a group and across, so that order is no matter."""
    got, want = outcomes[hybrid], run_plain(hybrid)
    assert torch.equal(joined(got), joined(want))
    assert got.losses == pytest.approx(want.losses, rel=1e-6) and got.losses[-1] < got.losses[0]


@pytest.mark.slow  # four processes train
@pytest.mark.parametrize("hybrid", ROUNDED, ids=str)
def test_accumulation_and_clipping_equal_plain_pytorch_within_rounding(
    hybrid: Case, outcomes: dict[Case, Outcome]
) -> None:
    got, want, allowed = outcomes[hybrid], run_plain(hybrid), TOLERANCES[hybrid.strategy.dtype]
    assert relative_difference(got.params, want.params) <= allowed.params
    assert got.losses == pytest.approx(want.losses, rel=allowed.loss)


@pytest.mark.slow  # four processes train
@pytest.mark.parametrize("hybrid", [*EXACT, *ROUNDED], ids=str)
def test_bytes_on_the_wire_are_the_forecast(hybrid: Case, outcomes: dict[Case, Outcome]) -> None:
    assert_traffic_is_forecast(hybrid, outcomes[hybrid])


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "optimizer", "optimizer,param"])
def test_memory_is_the_forecast(stage: int, offload: str) -> None:
    strategy = Strategy(zero_stage=stage, offload=offload, shard_size=4, bucket_bytes=300_000)  # type: ignore[arg-type]
    job = tiny.job(MODELS["llama"], strategy, world=16, n_micro_batches=2, seq_len=64)
    check(job, rank=9)


def join_groups(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=4, timeout=timedelta(seconds=77)
    )
    comm, span = Communicator(), Span(2, 2)
    comm.join([Collective("all_reduce", "grads", 0, 4, "reduce", ("cross", 0), span)])
    group = comm._group_of("reduce", span)
    assert dist.get_process_group_ranks(group) == [rank % 2, rank % 2 + 2]
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77)
    received = torch.empty(4, dtype=torch.uint8)
    comm.all_to_all(received, torch.arange(4, dtype=torch.uint8) + 10 * rank, span).wait()
    place = rank // 2
    assert received.tolist() == [10 * r + 2 * place + i for r in (rank % 2, rank % 2 + 2) for i in (0, 1)]
    assert comm.bytes == {"all_to_all": 4}
    dist.barrier()
    dist.destroy_process_group()


def test_groups_wait_as_long_as_the_default_one(tmp_path: Path) -> None:
    """And a collective over ranks 0 and 2 (and 1 and 3) reaches these."""
    mp.spawn(join_groups, (str(tmp_path),), nprocs=4)


def programme(**fields: object) -> list:
    strategy = Strategy(zero_stage=3, bucket_bytes=1, **fields)  # type: ignore[arg-type]
    job = tiny.job(tiny.LLAMA, strategy, world=8, n_micro_batches=3)
    program = lay_out(job).program
    return [e for section in program.step for _ in range(section.repeat) for e in section.events] + list(program.init)


def test_the_outer_sum_runs_once_per_step_over_the_replicas() -> None:
    spans = [(e.op, e.span) for e in programme(shard_size=2) if isinstance(e, Collective) and e.purpose == "grads"]
    n_groups = 4  # embedding, two blocks, head
    assert spans.count(("reduce_scatter", Span(2))) == 3 * n_groups
    assert spans.count(("all_reduce", Span(4, 2))) == n_groups
    assert len(spans) == 4 * n_groups


def test_states_are_those_of_the_smaller_group() -> None:
    """Two ranks per copy hold as much each as in a job of two ranks."""
    held = {
        e.buffer for e in programme(shard_size=2) if isinstance(e, Alloc) and e.buffer.category == "optimizer_state"
    }
    job = tiny.job(tiny.LLAMA, Strategy(zero_stage=3, bucket_bytes=1), world=2)
    alone = {b.buffer for b in lay_out(job).program.init if b.buffer.category == "optimizer_state"}  # type: ignore[union-attr]
    assert held == alone and held


def test_one_group_of_all_ranks_is_plain_zero() -> None:
    assert programme(shard_size=8) == programme()


def test_spans_of_ranks() -> None:
    assert Span(4).ranks(6) == [4, 5, 6, 7] and Span(4).place(6) == 2
    assert Span(2, 4).ranks(6) == [2, 6] and Span(2, 4).place(6) == 1


@pytest.mark.parametrize(
    ("stage", "size", "world", "sentence"),
    [
        (
            0,
            2,
            4,
            "shard_size is 2 with zero 0; allowed: 0 (all data-parallel ranks), or with zero 1, 2 or 3 at least 2",
        ),
        (
            3,
            1,
            4,
            "shard_size is 1 with zero 3; allowed: 0 (all data-parallel ranks), or with zero 1, 2 or 3 at least 2",
        ),
        (3, 3, 4, "shard_size is 3; allowed: a divisor of the 4 data-parallel GPUs"),
    ],
)
def test_impossible_groups_are_refused(stage: int, size: int, world: int, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        tiny.job(tiny.GPT, Strategy(zero_stage=stage, shard_size=size), world=world)
    assert str(error.value) == sentence


def test_a_fake_rank_reports_what_its_job_moves(tmp_path: Path) -> None:
    hybrid = case(8, 2, zero_stage=2, shard_size=4)
    assert_traffic_is_forecast(hybrid, Outcome([], {}, *_traffic(hybrid)))


def _traffic(hybrid: Case) -> tuple[dict[str, int], dict[str, int]]:
    measured = metered(hybrid.job, rank=5)
    return measured.collective_bytes, measured.collective_calls
