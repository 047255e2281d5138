"""Tensor and sequence parallelism: as plain PyTorch trains, with the forecast's bytes in memory and between ranks."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy
from estimator.predict import lay_out, memory_of, predict, traffic_of
from estimator.schedule.events import Collective, GradNorm
from runtime import initialize
from runtime.models import Decoder
from tests.runtime import tiny
from tests.runtime.memory import MODELS, compare, metered
from tests.runtime.sessions import WAYS, train_and_check

pytestmark = pytest.mark.usefixtures("one_thread")


def _spec(spec: ModelSpec, tp: int) -> ModelSpec:
    """``spec`` with heads for ``tp`` ranks."""
    return replace(spec, n_heads=max(spec.n_heads, tp), n_kv_heads=max(spec.n_kv_heads, tp))


def _cases(world: int) -> list[Job]:
    """Every model, stage, precision and kind of recomputation meets both kinds of residual stream."""
    jobs = []
    for number, (spec, sequence) in enumerate(product(MODELS.values(), (True, False))):
        for other, fields in enumerate(WAYS):
            if (number + other) % 2 and world > 2:
                continue
            tp = 4 if world == 4 and number % 3 == 0 else 2
            strategy = Strategy(tp=tp, sequence_parallel=sequence, bucket_bytes=20_000, **fields)  # type: ignore[arg-type]
            jobs.append(tiny.job(_spec(spec, tp), strategy, world=world, n_micro_batches=1 + other % 2, arch="cpu"))
    return jobs


QUICK = {2: (7, 22), 4: (1, 8, 14)}


def _train(world: int, numbers: list[int], folder: Path) -> None:
    cases = _cases(world)
    train_and_check([cases[number] for number in numbers], folder)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_it_trains_as_plain_pytorch_with_the_forecast_bytes(world: int, tmp_path: Path) -> None:
    _train(world, list(QUICK[world]), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", sorted(QUICK))
def test_all_of_them_do(world: int, tmp_path: Path) -> None:
    _train(world, [n for n in range(len(_cases(world))) if n not in QUICK[world]], tmp_path)


# ---- memory and traffic on tensors without data -------------------------------------------------------------------------

SHAPES = [
    pytest.param(
        name, sequence, stage, recompute, dtype, world,
        marks=() if (name, recompute, world) in (("gpt", "selective", 2), ("llama", "none", 8), ("qwen3", "full", 8)) else pytest.mark.slow,
    )
    for name, sequence, stage, recompute, dtype, world in product(
        MODELS, (True, False), (0, 1, 2, 3), ("none", "selective", "full"), ("fp32", "bf16"), (2, 8)
    )
]  # fmt: skip


@pytest.mark.parametrize(("name", "sequence", "stage", "recompute", "dtype", "world"), SHAPES)
def test_live_bytes_and_traffic_are_the_forecast_s(
    name: str, sequence: bool, stage: int, recompute: str, dtype: str, world: int
) -> None:
    off = ("all",) if stage % 2 else ()
    strategy = Strategy(
        tp=2, sequence_parallel=sequence, zero_stage=stage, dtype=dtype, recompute=recompute, bucket_bytes=200_000,  # type: ignore[arg-type]
        kernels_off=off,
    )  # fmt: skip
    job = tiny.job(
        _spec(MODELS[name], 2), strategy, world=world, n_micro_batches=1 + stage % 2, micro_batch=4, seq_len=64
    )
    got, blueprint = metered(job, rank=world - 1), lay_out(job)
    assert (got.collective_bytes, got.collective_calls) == traffic_of(blueprint.program, blueprint.costs)[:2]
    compare(got, memory_of(blueprint))


# ---- by hand --------------------------------------------------------------------------------------------------------------


def _job(**fields: object) -> Job:
    return tiny.job(tiny.LLAMA, Strategy(tp=2, **fields), world=4, arch="hopper")  # type: ignore[arg-type]


def test_a_block_exchanges_what_korthikanti_counts() -> None:
    """Llama, 2 x 16 tokens of width 32 in bf16 (2 KiB): four collectives forward and four backward, and with sequence
    parallelism, where what was gathered is not kept, two gathers more."""
    full = 2 * 16 * 32 * 2
    block = lay_out(_job()).costs[1]
    ways = [[op.name for op in ops if op.kind == "collective"] for ops in (block.forward, block.backward)]
    assert ways[0] == ["all_gather", "reduce_scatter"] * 2
    assert sorted(ways[1]) == ["all_gather"] * 4 + ["reduce_scatter"] * 2
    assert {op.n_bytes for op in (*block.forward, *block.backward) if op.kind == "collective"} == {full}
    block = lay_out(_job(sequence_parallel=False)).costs[1]
    ways = [[op.name for op in ops if op.kind == "collective"] for ops in (block.forward, block.backward)]
    assert ways == [["all_reduce"] * 2, ["all_reduce"] * 2]


def test_gradients_of_what_all_hold_are_summed_over_tensor_ranks_once_per_step() -> None:
    """With sequence parallelism each rank sees its own tokens; without, all see the same."""
    for sequence, times in ((True, 1), (False, 0)):
        program = lay_out(_job(sequence_parallel=sequence, bucket_bytes=1 << 30)).program
        events = [event for section in program.step for event in section.events for _ in range(section.repeat)]
        sums = [e for e in events if isinstance(e, Collective) and e.tag[0] == "cross"]
        assert len(sums) == times
        norms = [e for e in events if isinstance(e, GradNorm)]
        assert sorted(e.copies for e in norms) == [1, 2]


def test_half_the_model_and_half_the_arithmetic() -> None:
    one, two = predict(tiny.job(tiny.LLAMA, Strategy(), world=2)), predict(_job())
    tokens = 2 * 2 * 16
    assert one.model_flops == pytest.approx(two.model_flops, rel=0.05)  # 61 rows of vocabulary make 31 and 31
    assert two.tokens_per_s == pytest.approx(tokens / two.step_s)
    assert two.time_parts_s["exposed_other_comm"] > one.time_parts_s["exposed_other_comm"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp": 4}, "tp is 4; allowed: a divisor of n_kv_heads = 2 of tiny-llama"),
        ({"tp": 2, "zero_stage": 0, "grad_compression": "one_bit"}, "tp is 2 with grad_compression 'one_bit'; allowed: one of the two"),
        ({"tp": 3}, "tp * pp * cp is 3 * 1 * 1 = 3; allowed: a divisor of gpus = 8"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        tiny.job(tiny.LLAMA, Strategy(**fields), world=8)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_a_model_that_was_not_made_for_it_is_refused() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with torch.device("meta"):
            model = Decoder(tiny.LLAMA)
        with pytest.raises(InputError, match="tp is 2; the model was made for 1"):
            initialize(model=model, strategy=Strategy(tp=2))
    finally:
        torch.distributed.destroy_process_group()
