"""Experts and latent attention in forecasts: FLOPs added up by hand, keys of jobs, job files, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy
from estimator.job.experts import Experts
from estimator.job.files import job_from_dict, job_to_dict, load_job
from estimator.job.hf import spec_from_config
from estimator.job.latent import LatentAttention
from estimator.ops.cost import UnitCost
from estimator.ops.layers import Shape, block_graph
from estimator.ops.liveness import unit_cost
from estimator.predict import flops_of, lay_out, memory_of, predict
from estimator.sharding.units import count_params, model_units
from tests.runtime import tiny
from tests.runtime.experts import ALL, BIASED, DEEPSEEK_V3, MIXTRAL

TOKENS, D, F = 32, 32, 44
SHAPE = Shape(2, 16, "bf16", False)
EXPERT = 2 * 3 * D * F
"""FLOPs of one token in one expert of ``MIXTRAL``."""


def cost(spec: ModelSpec, **experts: Any) -> UnitCost:
    assert spec.experts is not None
    return unit_cost(block_graph(spec, SHAPE, 0, replace(spec.experts, **experts)), "none")


def grouped(of: UnitCost) -> float:
    return sum(op.flops for op in of.forward if op.name == "grouped")


def test_only_the_chosen_experts_count() -> None:
    """Two of four experts, and a router."""
    routed = cost(MIXTRAL)
    assert grouped(routed) == TOKENS * 2 * EXPERT
    dense = unit_cost(block_graph(replace(MIXTRAL, experts=None), SHAPE, 0), "none")
    assert flops_of([routed])[0] - flops_of([dense])[0] == 3 * TOKENS * (EXPERT + 2 * D * 4)
    backward = sum(op.flops for op in routed.backward if op.name.startswith("grouped"))
    assert backward == 2 * grouped(routed)


@pytest.mark.parametrize("name", ["grouped", "grouped_dgrad", "grouped_wgrad"])
def test_products_of_experts_are_batches_with_even_rows(name: str) -> None:
    """64 choices among four experts: 16 rows each, of D = 32 in, F = 44 out for the first of three products."""
    routed = cost(MIXTRAL)
    ops = [op for op in (*routed.forward, *routed.backward) if op.name == name]
    shapes = {"grouped": (4, 16, 44, 32), "grouped_dgrad": (4, 16, 32, 44), "grouped_wgrad": (4, 44, 32, 16)}
    assert len(ops) == 3 and shapes[name] in [op.shape for op in ops]
    for op in ops:
        groups, m, n, k = op.shape
        assert op.flops == 2 * groups * m * n * k and op.useful == 1
        assert op.n_bytes == 2 * (64 * (D + F) + 4 * D * F)


@pytest.mark.parametrize(("factor", "computed", "useful"), [(1.25, 80, 64 / 80), (1.0, 64, 1), (0.5, 32, 1)])
def test_slots_of_a_capacity_are_computed_but_empty_ones_are_no_work_of_the_model(
    factor: float, computed: int, useful: float
) -> None:
    """16 choices fall on an expert's even share: 20, 16 and 8 slots for each of four."""
    routed = cost(MIXTRAL, capacity_factor=factor)
    assert grouped(routed) == computed * EXPERT
    assert {op.useful for op in routed.forward if op.name == "grouped"} == {useful}
    dropless = cost(MIXTRAL)
    kept = min(64, computed)
    assert flops_of([dropless])[0] - flops_of([routed])[0] == pytest.approx(3 * (64 - kept) * EXPERT)


def test_experts_of_which_some_are_idle() -> None:
    """Eight rows cannot keep 16 experts busy: their weights are not read."""
    shape = Shape(1, 8, "bf16", False)
    spec = replace(MIXTRAL, experts=Experts(n_experts=16, per_token=1, d_ff=F))
    ops = unit_cost(block_graph(spec, shape, 0, spec.experts), "none").forward
    assert {op.shape[:2] for op in ops if op.name == "grouped"} == {(8, 1)}


def test_flops_of_a_deepseek_block() -> None:
    """T tokens, 4 heads; rope 4, nope 8, value 8; ranks 16 and 20; three of eight experts of 20 beside a shared one of 40."""
    spec = DEEPSEEK_V3
    of = cost(spec)
    attention = D * 20 + 20 * 4 * 12 + D * (16 + 4) + 16 * 4 * (8 + 8) + 4 * 8 * D
    mlp = D * 8 + 3 * 3 * D * 20 + 3 * D * 40
    pairs = 2 * 4 * (16 * 17 / 2)
    assert flops_of([of])[0] == pytest.approx(3 * (2 * TOKENS * (attention + mlp) + 2 * pairs * (12 + 8)))
    (op,) = [op for op in of.forward if op.kind == "attention"]
    assert op.flops == 4 * pairs * 12, "the kernel computes with values as wide as keys"


def test_bytes_that_a_layer_of_experts_keeps() -> None:
    """bf16, one layer: what Mixtral's experts keep beyond attention's and the norms'."""
    routed = cost(MIXTRAL).forward_memory.after["activations"]
    dense = unit_cost(block_graph(replace(MIXTRAL, experts=None), SHAPE, 0), "none").forward_memory.after["activations"]
    slots = 64
    kept = 2 * slots * (2 * D + 3 * F)  # rows in and out; gate, up and their product
    kept += 4 * TOKENS * 4 + 8 * slots + 2 * slots + 8 * slots  # scores, chosen experts, weights, slots
    assert routed - dense == kept - 2 * TOKENS * 3 * F


def test_published_active_parameters() -> None:
    """Two FLOPs per token and active parameter, of which the embedding needs none: as their papers and cards say."""
    published = json.loads((Path(__file__).parents[1] / "data" / "hf_published.json").read_text())
    specs = {entry["name"]: spec_from_config(entry["config"]) for entry in published}
    for name, active in (("Mixtral-8x7B-v0.1", 12.9e9), ("DeepSeek-V3", 37e9), ("Qwen3-30B-A3B", 3.3e9)):
        spec = specs[name]
        job = tiny.job(spec, Strategy(zero_stage=3), world=8, micro_batch=1, seq_len=64)
        costs = lay_out(job).costs
        products = (op for c in costs for op in c.forward if op.kind == "matmul" and not op.backward)
        matrices = sum(op.flops * op.useful for op in products) / (2 * 64)
        assert matrices + spec.vocab_size * spec.d_model == pytest.approx(active, rel=0.02), name
        assert count_params(model_units(spec)) > 3 * active


def test_reports_of_models_with_experts() -> None:
    for spec in ALL:
        job = tiny.job(spec, Strategy(zero_stage=3), world=8)
        report = predict(job)
        assert report.step_s > 0 and 0 < report.mfu < 1
        assert report.peak_allocated_bytes == memory_of(lay_out(job)).peak_bytes


# ---- jobs ---------------------------------------------------------------------------------------------------------------


def test_keys_of_models_without_are_those_of_the_first_records() -> None:
    keys = [tiny.job(spec, Strategy()).key for spec in tiny.ALL[:5]]
    assert keys == ["8eec9424b178fe8c", "1aad507efac2cad7", "5992708f5120c554", "7233dc837cafe448", "a0fa138e88eff043"]


def test_every_field_of_experts_is_part_of_the_key() -> None:
    keys = {tiny.job(spec, Strategy()).key for spec in ALL}
    assert MIXTRAL.experts is not None
    for change in ({"per_token": 1}, {"balance_loss": 0.0}, {"capacity_factor": 1.0}, {"normalise": False}):
        keys.add(tiny.job(replace(MIXTRAL, experts=replace(MIXTRAL.experts, **change)), Strategy()).key)
    assert len(keys) == len(ALL) + 4


@pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
def test_job_files_hold_experts(spec: ModelSpec) -> None:
    job = tiny.job(spec, Strategy())
    assert job_from_dict(json.loads(json.dumps(job_to_dict(job)))) == job


TOML = """
[model]
name = "x"
family = "custom"
n_layers = 2
d_model = 32
n_heads = 2
n_kv_heads = 2
head_dim = 12
d_ff = 64
vocab_size = 100
max_positions = 64
{model}
[model.experts]
n_experts = 4
per_token = 2
d_ff = 24
{experts}
[model.latent]
kv_rank = 8
nope_head_dim = 8
rope_head_dim = 4
value_head_dim = 8
[cluster]
gpu = "h100"
"""


def load(folder: Path, model: str = "", experts: str = "") -> Job:
    path = folder / "job.toml"
    path.write_text(TOML.format(model=model, experts=experts))
    return load_job(path)


def test_job_files_in_toml(tmp_path: Path) -> None:
    spec = load(tmp_path, experts="balance_loss = 0.01\nscale = 2").model
    assert spec.experts == Experts(n_experts=4, per_token=2, d_ff=24, balance_loss=0.01, scale=2.0)
    assert spec.latent == LatentAttention(kv_rank=8, nope_head_dim=8, rope_head_dim=4, value_head_dim=8)


@pytest.mark.parametrize(
    ("model", "experts", "words"),
    [
        ("", "n_expert = 3", "did you mean 'n_experts'"),
        ("", "normalise = 1", "true or false"),
        ("", "capacity_factor = -1", "a finite number >= 0"),
        ("", "balance_loss = nan", "finite number"),
        ("gated_mlp = false", "", "experts are gated MLPs"),
        ("qk_norm = true", "", "qk_norm is True with latent attention"),
    ],
)
def test_job_files_refuse(model: str, experts: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load(tmp_path, model, experts)
    assert "\n" not in str(caught.value)


def test_what_tensor_parallel_ranks_do_not_share() -> None:
    with pytest.raises(InputError, match="tp is 2, but the experts of tiny-biased-experts have biases"):
        tiny.job(BIASED, Strategy(tp=2), world=2)
    with pytest.raises(InputError, match=r"tp is 4; allowed: a divisor of experts.d_ff = 22 of tiny-mixtral"):
        uneven = replace(MIXTRAL, n_kv_heads=4, experts=replace(MIXTRAL.experts, d_ff=22))
        tiny.job(uneven, Strategy(tp=4), world=4)
