"""Expert parallelism's layout, program and costs, worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy
from estimator.job.files import job_from_dict, job_to_dict
from estimator.job.mesh import Mesh, Span
from estimator.predict import lay_out, model_flops_of, predict
from estimator.schedule.events import Collective, GradNorm
from estimator.schedule.ranks import sharers
from estimator.sharding.tensor import parts
from estimator.sharding.units import Param, Split, model_units
from tests.runtime import tiny
from tests.runtime.experts import MIXTRAL, QWEN_MOE

TOKENS, D, F, E, K = 32, 32, 44, 4, 2


def spec(factor: float = 0.0) -> ModelSpec:
    assert MIXTRAL.experts is not None
    return replace(MIXTRAL, experts=replace(MIXTRAL.experts, capacity_factor=factor))


def job(ep: int, *, world: int = 4, factor: float = 0.0, **fields: Any) -> Job:
    return tiny.job(spec(factor), Strategy(ep=ep, **fields), world=world)


def collectives(of: Job, purpose: str) -> list[tuple[str, int, Span | None]]:
    events = [event for section in lay_out(of).program.step for event in section.events]
    return [(e.op, e.n_bytes, e.span) for e in events if isinstance(e, Collective) and e.purpose == purpose]


def test_a_rank_holds_its_share_of_every_expert_weight_and_all_else() -> None:
    whole, held = (
        {p.name: p for p in units[1].params} for units in (model_units(MIXTRAL), parts(model_units(MIXTRAL), 1, 2))
    )
    assert held["mlp.experts.gate"] == Param("mlp.experts.gate", (2, F, D), split=Split(0, E, "ep"))
    assert held["mlp.experts.down"] == Param("mlp.experts.down", (2, D, F), split=Split(0, E, "ep"))
    assert {name for name in whole if whole[name] != held[name]} == {f"mlp.experts.{x}" for x in ("gate", "up", "down")}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_experts_are_sharded_over_the_ranks_that_hold_the_same_ones(stage: int) -> None:
    """Eight ranks, two share the experts: 0, 2, 4 and 6 hold the same ones."""
    layout = lay_out(job(2, world=8, zero_stage=stage)).layout
    shared = [group for group in layout.groups if group.kind.expert]
    assert sum(group.numel for group in shared) == 2 * 3 * (E // 2) * D * F  # two layers
    assert {group.n_shards for group in shared} == {4}
    assert {group.n_shards for group in layout.groups if not group.kind.expert} == {8}
    span = sharers(shared[0], Mesh(dp=8), 2)
    assert (span.ranks(2), span.place(4), span.place(5)) == ([0, 2, 4, 6], 2, 2)


@pytest.mark.parametrize(
    ("stage", "op"), [(0, "all_reduce"), (1, "reduce_scatter"), (2, "reduce_scatter"), (3, "reduce_scatter")]
)
def test_gradients_are_summed_over_the_same_ranks(stage: int, op: str) -> None:
    expert_bytes = 2 * 2 * 3 * (E // 2) * D * F
    sums = collectives(job(2, world=8, zero_stage=stage), "grads")
    assert {name for name, _, _ in sums} == {op}
    assert sum(n_bytes for _, n_bytes, span in sums if span == Span(4, 2)) == expert_bytes
    assert all(span in (None, Span(4, 2)) for _, _, span in sums)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_experts_that_no_two_ranks_hold_are_neither_sharded_nor_summed(stage: int) -> None:
    blueprint = lay_out(job(4, zero_stage=stage))
    lonely = {group.number: group for group in blueprint.layout.groups if group.kind.expert}
    assert {group.n_shards for group in lonely.values()} == {1}
    events = [event for section in blueprint.program.step for event in section.events]
    assert not [e for e in events if isinstance(e, Collective) and e.group in lonely]
    notes = predict(job(4, zero_stage=stage)).notes
    assert any("no two GPUs hold the same experts" in note for note in notes) == (stage > 0)


@pytest.mark.parametrize(
    ("ep", "stage", "span", "copies"),
    [(2, 0, Span(2), {False: 2, True: 1}), (4, 0, None, {False: 4, True: 1}), (2, 1, None, {False: 1, True: 1}),
     (4, 3, None, {False: 1, True: 1})],
)  # fmt: skip
def test_the_norm_counts_every_gradient_once(ep: int, stage: int, span: Span | None, copies: dict[bool, int]) -> None:
    """Without sharding the ``ep`` ranks have other experts and the same of all else; sharded, all ranks have something else."""
    of = job(ep, zero_stage=stage)
    blueprint = lay_out(of)
    groups = {group.number: group for group in blueprint.layout.groups}
    norms = [event for event in blueprint.program.step[-1].events if isinstance(event, GradNorm)]
    assert {groups[e.group].kind.expert: e.copies for e in norms} == copies
    assert [s for _, _, s in collectives(of, "grad_norm")] == [span]


@pytest.mark.parametrize(
    ("ep", "factor", "rows"), [(2, 0.0, TOKENS * K), (4, 0.0, TOKENS * K), (2, 1.25, E * 20), (4, 0.5, E * 8)]
)
def test_bytes_between_the_ranks_of_experts(ep: int, factor: float, rows: int) -> None:
    """bf16: there and back, forward and backward, in each of two layers; dropless the number of rows for each expert besides."""
    report = predict(job(ep, factor=factor))
    counts = 0 if factor else 8 * E
    assert report.collective_bytes["all_to_all"] == 2 * (4 * rows * D * 2 + counts)
    assert report.collective_calls["all_to_all"] == 2 * (4 + (factor == 0))
    again = predict(job(ep, factor=factor, recompute="full"))
    assert again.collective_bytes["all_to_all"] == 2 * (6 * rows * D * 2 + 2 * counts)


@pytest.mark.parametrize("factor", [0.0, 1.25, 0.5])
@pytest.mark.parametrize("ep", [2, 4])
def test_model_flops_are_those_of_one_rank_s_experts(ep: int, factor: float) -> None:
    assert model_flops_of(job(ep, factor=factor))[0] == model_flops_of(job(1, factor=factor))[0]


def test_products_have_the_rows_of_all_ranks() -> None:
    """Two of four experts here, from each of two ranks 64 rows of which half come: 32 for each expert, then 1.5 times as many."""
    for imbalance, m in ((1.0, 32), (1.5, 48)):
        ops = [op for op in lay_out(job(2, expert_imbalance=imbalance)).costs[1].forward if op.name == "grouped"]
        assert {op.shape[:2] for op in ops} == {(2, m)}
        assert {op.useful for op in ops} == {1 / imbalance}


def test_a_loaded_rank_takes_longer_and_more_memory_for_the_same_work() -> None:
    even, loaded = (
        predict(tiny.job(spec(), Strategy(ep=2, expert_imbalance=x), world=4, micro_batch=64)) for x in (1.0, 2.0)
    )
    assert loaded.model_flops == even.model_flops and loaded.mfu < even.mfu
    assert loaded.step_s > even.step_s
    assert loaded.time_parts_s["exposed_other_comm"] > even.time_parts_s["exposed_other_comm"]
    assert loaded.peak_allocated_bytes > even.peak_allocated_bytes
    assert any("one that gets 2 times the mean" in note for note in loaded.notes)


def test_across_nodes_the_exchange_takes_longer() -> None:
    one, many = (
        predict(tiny.job(spec(1.0), Strategy(ep=ep, zero_stage=1), world=32, micro_batch=512)).time_parts_s[
            "exposed_other_comm"
        ]
        for ep in (2, 4)
    )
    assert 0 < one < many


def test_fields_in_files_and_keys() -> None:
    loaded = job(2, expert_imbalance=1.5)
    assert job_from_dict(json.loads(json.dumps(job_to_dict(loaded)))) == loaded
    assert loaded.key != job(2).key
    assert job(1, expert_imbalance=1.5).key == job(1).key, "all experts are on every rank"


@pytest.mark.parametrize(
    ("model", "fields", "words"),
    [
        (tiny.LLAMA, {"ep": 2}, "ep is 2, but tiny-llama has no experts"),
        (QWEN_MOE, {"ep": 4}, "ep is 4; allowed: a divisor of the 6 experts of tiny-qwen-moe"),
        (MIXTRAL, {"ep": 8}, "ep is 8; allowed: a divisor of the"),
        (MIXTRAL, {"ep": 2, "expert_imbalance": 3}, "a number from 1"),
        (MIXTRAL, {"ep": 2, "expert_imbalance": 0.5}, "a number >= 1"),
        (spec(1.0), {"ep": 2, "expert_imbalance": 1.5}, "expert_imbalance is 1.5 with capacity_factor 1.0"),
        (MIXTRAL, {"ep": 2, "zero_stage": 2, "shard_size": 2}, "ep is 2 with shard_size 2; allowed: one of the two"),
        (MIXTRAL, {"ep": 2, "zero_stage": 3, "quantized_weights": True}, "ep is 2 with quantized_weights True"),
        (MIXTRAL, {"ep": 2, "grad_compression": "one_bit"}, "ep is 2 with grad_compression 'one_bit'"),
    ],
)
def test_what_does_not_go_together_is_refused(model: ModelSpec, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        tiny.job(model, Strategy(**fields), world=4)
    assert words in str(caught.value)


def test_ep_divides_the_data_ranks() -> None:
    with pytest.raises(InputError, match="ep is 4; allowed: a divisor of the 6 data-parallel GPUs"):
        job(4, world=6)
