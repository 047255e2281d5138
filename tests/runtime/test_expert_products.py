"""Experts and latent attention shared along other axes too: tensor, pipeline, expert and data parallel ranks train as plain PyTorch
does, and hold and send what is forecast."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from estimator.job import Job, ModelSpec, Strategy
from estimator.predict import lay_out, memory_of, model_flops_of, traffic_of
from estimator.sharding.tensor import parts
from estimator.sharding.units import model_units
from tests.runtime import tiny
from tests.runtime.memory import compare, metered
from tests.runtime.sessions import train_and_check
from tests.runtime.test_expert_parallel import with_capacity
from tests.runtime.test_experts_memory import MODELS

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(1800)]


def _spec(name: str, factor: float = 0.0) -> ModelSpec:
    """With four layers: a stage of two has one with a dense MLP, where the model has such."""
    spec = MODELS[name]
    return with_capacity(replace(spec, n_layers=4, n_kv_heads=max(2, spec.n_kv_heads)), factor)


def _job(world: int, name: str, factor: float = 0.0, **fields: Any) -> Job:
    """SGD, because Adam hardly notices a wrong factor on all gradients; clipped, because the norm is a sum over ranks. Ranks that
    share sequences balance the loads of their own tokens only."""
    usual = {"dtype": "fp32", "bucket_bytes": 20_000, "optimizer": "sgd", "grad_clip": 0.1}
    spec = _spec(name, factor)
    if fields.get("cp", 1) > 1:
        assert spec.experts is not None
        spec = replace(spec, experts=replace(spec.experts, balance_loss=0.0))
    return tiny.job(spec, Strategy(**{**usual, **fields}), world=world, n_micro_batches=4, arch="cpu")


QUICK = [_job(2, "mixtral", tp=2)]
ZB = {"pp_schedule": "zero_bubble"}
ROOM = 8.0
"""A capacity factor with which nobody is dropped, of whatever tokens."""
SLOW = {
    2: [
        _job(2, "mixtral", tp=2, sequence_parallel=False),
        _job(2, "deepseek-v3", pp=2, recompute="full"),
        _job(2, "qwen-moe", tp=2, recompute="selective", zero_stage=3),
        _job(2, "qwen-moe", tp=2, sequence_parallel=False, recompute="full"),
        _job(2, "deepseek-v2", tp=2),
        _job(2, "deepseek-v3", tp=2, sequence_parallel=False, recompute="mlp"),
        _job(2, "mixtral", pp=2, **ZB),
        _job(2, "qwen-moe", pp=2, virtual_pp=2, pp_schedule="interleaved_1f1b"),
        _job(2, "biased", pp=2, pp_schedule="gpipe"),
        _job(2, "mixtral", cp=2, recompute="full"),
        _job(2, "deepseek-v3", cp=2, zero_stage=3),
        _job(2, "deepseek-v2", cp=2, cp_kind="ring", recompute="selective"),
    ],
    4: [
        _job(4, "mixtral", 1.25, tp=2, ep=2),
        _job(4, "qwen-moe", 1.0, tp=2, ep=2, zero_stage=2, sequence_parallel=False),
        _job(4, "deepseek-v3", 1.25, tp=2, ep=2, zero_stage=1, recompute="selective"),
        _job(4, "mixtral", tp=2, pp=2, recompute="selective"),
        _job(4, "deepseek-v2", tp=2, pp=2, **ZB),
        _job(4, "qwen-moe", 1.0, pp=2, ep=2, zero_stage=1, **ZB),
        _job(4, "deepseek-v3", 1.25, pp=2, ep=2, zero_stage=3, virtual_pp=2, pp_schedule="interleaved_1f1b"),
        _job(4, "mixtral", tp=2, offload="optimizer", zero_stage=2),
        _job(4, "deepseek-v3", cp=2, tp=2),
        _job(4, "qwen-moe", cp=2, pp=2, **ZB),
        _job(4, "mixtral", ROOM, cp=2, ep=2, zero_stage=2),
        _job(4, "deepseek-v2", ROOM, cp=2, ep=4, zero_stage=1, cp_kind="ring"),
    ],
    8: [
        _job(8, "deepseek-v3", 1.25, pp=2, ep=2, zero_stage=3),
        _job(8, "qwen-moe", 1.0, pp=2, ep=2, zero_stage=2),
        _job(8, "mixtral", 1.25, tp=2, pp=2, ep=2, zero_stage=1, **ZB),
        _job(8, "deepseek-v2", 1.25, tp=2, ep=2, zero_stage=3, recompute="full"),
    ],
}


def test_they_train_as_plain_pytorch(tmp_path: Path) -> None:
    train_and_check(QUICK, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", list(SLOW))
def test_so_do_all_products(world: int, tmp_path: Path) -> None:
    train_and_check(SLOW[world], tmp_path)


# ---- live bytes of one rank of 16 ---------------------------------------------------------------------------------------

WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"sequence_parallel": False, "recompute": "full"},
    {"recompute": "selective", "zero_stage": 3},
    {"sequence_parallel": False, "recompute": "selective"},
    {"recompute": "mlp", "sequence_parallel": False, "ep": 4},
    {"ep": 2, "zero_stage": 3, "recompute": "activation,norms"},
    {"pp": 2, "ep": 2, **ZB},
    {"pp": 2, "ep": 4, "zero_stage": 3, "sequence_parallel": False},
    {"dtype": "fp32", "kernels_off": ("all",), "zero_stage": 2},
    {"cp": 2, "cp_kind": "ring", "ep": 2, "zero_stage": 2},
    {"tp": 1, "cp": 2, "recompute": "attention", "ep": 4},
    {"ep": 2, "zero_stage": 1, "recompute": "selective"},
    {"recompute": "full"},
)
NAMES = [name for name in MODELS if name != "biased"]
GRID = [
    (NAMES[(i + j) % len(NAMES)], (0.0, 1.25)[(i + j // 4) % 2], way) for i, way in enumerate(WAYS) for j in range(4)
]


def _says(case: tuple) -> str:
    return "-".join(map(str, case))


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if i % 4 == 0 else pytest.mark.slow) for i, c in enumerate(GRID)],
                         ids=_says)  # fmt: skip
def test_live_bytes_and_messages_of_a_tensor_parallel_rank(case: tuple) -> None:
    name, factor, way = case
    strategy = Strategy(**{"tp": 2, "dtype": "bf16", "bucket_bytes": 300_000, **way})
    n_experts = _spec(name).experts.n_experts  # type: ignore[union-attr]
    if n_experts % strategy.ep:
        strategy = replace(strategy, ep=2)
    job = tiny.job(_spec(name, factor), strategy, world=16, n_micro_batches=3, micro_batch=4, seq_len=64)
    got, blueprint = metered(job, rank=5), lay_out(job, job.mesh.place("pp", 5))
    compare(got, memory_of(blueprint))
    assert traffic_of(blueprint.program, blueprint.costs)[:2] == (got.collective_bytes, got.collective_calls)


# ---- what is shared -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (2, 2), (1, 2)])
def test_ranks_together_hold_every_parameter_once(name: str, tp: int, ep: int) -> None:
    """Routers, norms and the narrow projections of latent attention are everybody's."""
    units = model_units(_spec(name))
    held = {f"{u.name}.{p.name}": p for u in parts(units, tp, ep) for p in u.params}
    with_experts = [f"{u.name}.{p.name}" for u in units for p in u.params if ".experts." in f".{p.name}"]
    assert with_experts
    for unit in units:
        for param in unit.params:
            full = f"{unit.name}.{param.name}"
            own = held[full]
            expected = param.numel // (tp * ep) if full in with_experts else param.numel // (tp if own.split else 1)
            assert own.numel == expected, full
    assert held["blocks.3.mlp.router.weight"].split is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sequence", [True, False])
def test_tensor_parallelism_adds_no_model_flops(name: str, sequence: bool) -> None:
    """What every rank computes for itself counts once; two data ranks have twice the tokens."""
    apart, together = (model_flops_of(_job(2, name, tp=tp, sequence_parallel=sequence))[0] for tp in (1, 2))
    assert together == pytest.approx(apart / 2, rel=1e-12)
