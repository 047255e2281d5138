"""Constants of frameworks on GPUs: what they do to operators and steps, where they come from, and what intervals they give."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from math import exp
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator import catalog
from estimator.job.options import JobOptions, build_job
from estimator.ops.operator import Op
from estimator.predict import predict
from estimator.report import TIME_PARTS
from estimator.time.interval import NOMINAL, UNKNOWN, conformal
from estimator.time.operators import COLD_EFFICIENCY, JOULES_PER_FLOP, OTHER_JOULES_PER_FLOP, OperatorTimer
from estimator.time.profile import profile_for
from estimator.time.stack import (
    LONE,
    PRIOR,
    RANGES,
    STACKS,
    Shipped,
    Stack,
    shipped_stacks,
    typical,
    write_stacks,
)
from estimator.time.stragglers import expected_maximum

PARTS = dict.fromkeys(TIME_PARTS, 0.0)


def product(m: int = 8192, n: int = 8192, k: int = 8192) -> Op:
    return Op("linear", "matmul", False, "bf16", 2.0 * m * n * k, 2 * (m * n + n * k + m * k), (1, m, n, k))


def test_every_constant_has_a_range_and_ships_inside_it() -> None:
    assert [f.name for f in fields(Stack)] == list(RANGES)
    assert len(RANGES) <= 12
    for name, r in RANGES.items():
        assert r.low <= r.prior <= r.high and r.width > 0, name
    shipped = shipped_stacks()
    assert shipped.stacks
    for key, stack in shipped.stacks.items():
        for name, value in asdict(stack).items():
            assert RANGES[name].low <= value <= RANGES[name].high, (key, name)


def test_long_products_run_at_what_the_boards_power_sustains() -> None:
    gpu = catalog.gpu("h100-sxm")
    profile = profile_for(gpu)[0]
    lone, trained = OperatorTimer(gpu, profile), OperatorTimer(gpu, profile, 1, Stack())
    assert gpu.arch not in JOULES_PER_FLOP
    sustained = COLD_EFFICIENCY * (700 / (OTHER_JOULES_PER_FLOP * gpu.peak_flops["bf16"])) ** (1 / 3)
    assert profile.chip is not None
    assert sustained < profile.chip.matmul_efficiency["bf16"]
    kernel_s = profile.chip.kernel_s
    ratio = (trained.seconds(product()) - kernel_s) / (lone.seconds(product()) - kernel_s)
    assert ratio == pytest.approx(profile.chip.matmul_efficiency["bf16"] / sustained)
    half = replace(gpu, tdp_watts=350.0)
    slower = OperatorTimer(half, profile, 1, Stack()).seconds(product()) - kernel_s
    assert slower / (trained.seconds(product()) - kernel_s) == pytest.approx(2 ** (1 / 3))


def test_split_k_fills_the_chip_where_tiles_are_few() -> None:
    gpu = catalog.gpu("a100-80")
    timer = OperatorTimer(gpu, profile_for(gpu)[0])
    few, many = product(512, 512, 65536), product(16384, 16384, 512)
    rate = {op: op.flops / timer.seconds(op) for op in (few, many)}
    assert rate[few] > 0.5 * rate[many]  # 8 tiles of 256 x 128 on 108 SMs would reach 0.08 of it


def test_hand_computed_surroundings_of_a_step() -> None:
    stack = Stack(contention=0.5, overlapped=0.25, straggling=0.01, step_s=0.1)
    parts = PARTS | {"forward": 1.0, "backward": 3.0, "exposed_gather": 0.4, "exposed_reduce": 0.2}
    busy = {"gather": 1.0, "reduce": 1.5}
    slowed = stack.slowed(parts, busy, 1, 1)
    assert slowed["exposed_gather"] == pytest.approx(0.3)  # of 0.4 a quarter is hidden by the next step
    hidden = 1.0 + 1.5 - 0.3 - 0.2
    assert slowed["forward"] == pytest.approx(1.0 * (1 + 0.5 * hidden / 4.0))
    assert slowed["backward"] == pytest.approx(3.0 * (1 + 0.5 * hidden / 4.0))
    assert slowed["data"] == pytest.approx(0.1) and slowed["exposed_other_comm"] == 0.0
    three = stack.slowed(parts, busy, 1, 3)
    assert three["exposed_gather"] == 0.4  # stage 3 gathers what this step needs
    many = stack.slowed(parts, busy, 1000, 1)
    before = sum(slowed.values()) - 0.1
    assert many["exposed_other_comm"] == pytest.approx(0.01 * expected_maximum(1000) * before)


def test_without_constants_nothing_changes() -> None:
    parts = PARTS | {"forward": 1.0, "backward": 2.0, "exposed_reduce": 0.1}
    assert LONE.slowed(parts, {"reduce": 1.0}, 512, 2) == parts


def test_conformal_width_is_the_order_statistic_of_its_definition() -> None:
    errors = [0.01 * (i + 1) * (-1) ** i for i in range(19)]
    assert conformal(errors) == pytest.approx(0.18)  # the ceil(20 * 0.9) = 18th smallest of 19
    assert conformal([0.02, -0.3]) == 0.3  # too few: the largest
    assert conformal([]) == UNKNOWN


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=60))
def test_the_width_holds_its_share_of_the_errors(errors: list[float]) -> None:
    width = conformal(errors)
    assert sum(abs(e) <= width for e in errors) >= NOMINAL * len(errors)


def test_what_nobody_measured_takes_medians() -> None:
    assert typical([Stack(matmul=0.8), Stack(matmul=0.9), Stack(matmul=0.3, step_s=0.1)]) == Stack(matmul=0.8)
    assert typical([PRIOR]) == PRIOR


def test_constants_come_from_the_framework_then_its_other_gpus_then_others() -> None:
    def note(**options: object) -> str:
        job = build_job(JobOptions(model="llama-3-8b", gpu="a100-80", gpus=64, **options))  # type: ignore[arg-type]
        return next(note for note in predict(job).notes if note.startswith("time: "))

    fitted = {f for f, gpu in shipped_stacks().stacks if gpu == "a100-80"}
    assert {"composer", "fsdp2", "megatron"} <= fitted
    assert "constants of composer on a100-80" in note(framework="composer")
    other = build_job(JobOptions(model="llama-3-8b", gpu="l40s", gpus=64, framework="fsdp2"))
    assert any("fsdp2 on l40s was never measured; its constants on" in note for note in predict(other).notes)
    assert "zerocast was never measured on GPUs; medians over" in note()


def test_the_interval_is_that_of_runs_that_took_no_part() -> None:
    job = build_job(JobOptions(model="mpt-7b", gpu="a100-80", gpus=64, framework="composer"))
    report = predict(job)
    errors = [e for (f, g, by), own in shipped_stacks().errors.items() if (f, g, by) == ("composer", "a100-80", "model") for e in own.values()]  # fmt: skip
    assert report.step_s is not None and report.step_low_s is not None and report.step_high_s is not None
    assert report.step_high_s / report.step_s == pytest.approx(exp(conformal(errors)))
    assert report.step_low_s * report.step_high_s == pytest.approx(report.step_s**2)


def test_stacks_survive_writing_and_reading(tmp_path: Path) -> None:
    path = tmp_path / "stacks.json"
    shipped = Shipped(
        {("megatron", "*"): Stack(matmul=0.9)}, {("megatron", "b200", "model"): {"run": 0.0123}}, "2026-01-01"
    )
    write_stacks(path, shipped)
    data = json.loads(path.read_text())
    assert data["date"] == "2026-01-01" and data["stacks"][0]["constants"]["matmul"] == 0.9
    assert data["errors"][0] == {
        "framework": "megatron",
        "gpu": "b200",
        "left_out": "model",
        "log_errors": {"run": 0.0123},
    }
    write_stacks(path, shipped_stacks())
    assert json.loads(path.read_text())["stacks"] == json.loads(STACKS.read_text())["stacks"]
