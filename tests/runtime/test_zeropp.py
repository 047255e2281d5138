"""ZeRO++ under stage 3: int8 gathers and a second, nearer copy. Exact where nothing is rounded, near it elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from estimator.errors import InputError
from estimator.job import Strategy
from estimator.job.mesh import Span
from estimator.predict import lay_out, memory_of, predict
from estimator.schedule.events import Collective
from runtime.reference import TOLERANCES, relative_difference
from tests.runtime import tiny
from tests.runtime.grouped import Case, assert_traffic_is_forecast, case, joined, train
from tests.runtime.memory import MODELS, check, metered
from tests.runtime.parity_worker import Outcome, run_plain

pytestmark = pytest.mark.timeout(600)

NEAR = [
    case(4, 1, zero_stage=3, dtype="fp32", secondary_shard=2),
    case(4, 3, zero_stage=3, dtype="bf16", secondary_shard=2, prefetch_depth=3, offload="optimizer"),
    case(4, 2, zero_stage=3, dtype="fp32", secondary_shard=2, shard_size=2, recompute="full"),
]
ROUNDED = [
    case(4, 1, zero_stage=3, dtype="fp32", quantized_weights=True),
    case(4, 2, zero_stage=3, dtype="bf16", quantized_weights=True, secondary_shard=2, grad_clip=1.0),
]
GAP = 0.01
"""Largest relative difference of the last loss from exact training's after 20 steps."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Outcome]:
    return train(4, [*NEAR, *ROUNDED], tmp_path_factory.mktemp("zeropp"))


@pytest.mark.slow  # four processes train
@pytest.mark.parametrize("near", NEAR, ids=str)
def test_a_nearer_copy_changes_nothing(near: Case, outcomes: dict[Case, Outcome]) -> None:
    got, want, allowed = outcomes[near], run_plain(near), TOLERANCES[near.strategy.dtype]
    assert relative_difference(got.params, want.params) <= allowed.params
    assert got.losses == pytest.approx(want.losses, rel=allowed.loss)


def test_two_ranks_with_a_copy_each_are_bit_equal_to_plain_pytorch(tmp_path: Path) -> None:
    near = case(2, 2, zero_stage=3, dtype="fp32", secondary_shard=2)
    assert torch.equal(joined(train(2, [near], tmp_path)[near]), joined(run_plain(near)))


@pytest.mark.slow  # four processes train
@pytest.mark.parametrize("rounded", ROUNDED, ids=str)
def test_int8_weights_train_nearly_as_exact_ones(rounded: Case, outcomes: dict[Case, Outcome]) -> None:
    got, want = outcomes[rounded], run_plain(rounded)
    assert got.losses[-1] == pytest.approx(want.losses[-1], rel=GAP) and want.losses[-1] < 0.9 * want.losses[0]
    assert not torch.equal(joined(got), joined(want))


@pytest.mark.slow  # four processes train
@pytest.mark.parametrize("any_case", [*NEAR, *ROUNDED], ids=str)
def test_bytes_on_the_wire_are_the_forecast(any_case: Case, outcomes: dict[Case, Outcome]) -> None:
    assert_traffic_is_forecast(any_case, outcomes[any_case])


FIELDS = [
    {"quantized_weights": True}, {"secondary_shard": 4}, {"quantized_weights": True, "secondary_shard": 2},
    {"quantized_weights": True, "shard_size": 8}, {"secondary_shard": 4, "shard_size": 8, "persistent_numel": 200},
]  # fmt: skip


@pytest.mark.parametrize("offload", ["none", "optimizer"])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_memory_is_the_forecast(fields: dict, offload: str) -> None:
    strategy = Strategy(zero_stage=3, prefetch_depth=2, offload=offload, **fields)  # type: ignore[arg-type]
    for n_micro_batches in (1, 3):
        job = tiny.job(MODELS["gpt"], strategy, world=16, n_micro_batches=n_micro_batches, seq_len=64)
        assert check(job, rank=9).collective_bytes == predict(job).collective_bytes


def test_a_cpu_rank_over_the_fake_group_trains_on_plausible_values() -> None:
    strategy = Strategy(zero_stage=3, dtype="fp32", quantized_weights=True, secondary_shard=2)
    job = tiny.job(tiny.GPT, strategy, world=4, n_micro_batches=2, arch="cpu")
    measured = metered(job, "cpu", rank=3)
    assert all(0 < loss < 10 for loss in measured.losses)
    assert (
        measured.category_peak_bytes["gathered_params"]
        == memory_of(lay_out(job)).category_peak_bytes["gathered_params"]
    )


def gathers(n_micro_batches: int, **fields: object) -> list[Collective]:
    job = tiny.job(tiny.LLAMA, Strategy(zero_stage=3, **fields), world=8, n_micro_batches=n_micro_batches)  # type: ignore[arg-type]
    return [
        e for s in lay_out(job).program.step for _ in range(s.repeat) for e in s.events
        if isinstance(e, Collective) and e.purpose == "params"
    ]  # fmt: skip


def test_only_the_first_gather_of_a_step_leaves_the_group_nearby() -> None:
    """Four groups; two of them (blocks) are gathered again for each backward pass, all for the second forward pass."""
    spans = [e.span for e in gathers(2, secondary_shard=4)]
    assert spans.count(None) == 4 and spans.count(Span(4)) == 2 + 4 + 2


def test_an_int8_gather_has_half_of_bf16s_bytes_and_a_scale_for_every_256() -> None:
    exact, rounded = gathers(1), gathers(1, quantized_weights=True)
    padded = sum(-(-e.n_bytes // 2 // (8 * 256)) * 8 * 256 for e in exact)
    codes = [e.n_bytes for e in rounded if e.tag[0] == "gather_codes"]
    scales = [e.n_bytes for e in rounded if e.tag[0] == "gather_scales"]
    assert sum(codes) == padded and sum(scales) == padded // 64
    assert len(codes) == len(scales) == len(exact)


def test_fewer_bytes_between_nodes_take_less_time() -> None:
    def gather_s(**fields: object) -> float:
        job = tiny.job(MODELS["llama"], Strategy(zero_stage=3, **fields), world=64, n_micro_batches=4)  # type: ignore[arg-type]
        return predict(job).time_parts_s["exposed_gather"]

    assert gather_s(secondary_shard=8) < 0.6 * gather_s()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"zero_stage": 2, "quantized_weights": True},
         "quantized_weights is True with zero 2 and offload 'none'; allowed: only where parameters are gathered from GPUs "
         "(zero 3, parameters not offloaded)"),
        ({"zero_stage": 3, "secondary_shard": 3}, "secondary_shard is 3; allowed: a divisor of the 8 GPUs that share a copy of the model"),
        ({"zero_stage": 3, "secondary_shard": 1}, "secondary_shard is 1; allowed: 0 (none), or at least 2"),
        ({"zero_stage": 3, "quantized_weights": 1}, "quantized_weights is 1; allowed: true or false"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(fields: dict, sentence: str) -> None:
    with pytest.raises(InputError) as error:
        tiny.job(tiny.GPT, Strategy(**fields), world=8)
    assert str(error.value) == sentence
