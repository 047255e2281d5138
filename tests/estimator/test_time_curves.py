"""Operators, collectives, copies and profiles: floors, monotonicity, agreement with the published rows, the file."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator import catalog
from estimator.errors import InputError
from estimator.job import Cluster, Gpu, Host
from estimator.ops.operator import Op
from estimator.time.network import CollectiveTimer
from estimator.time.operators import OperatorTimer, curve_seconds, seconds_curve
from estimator.time.profile import (
    AttentionPoint,
    BandwidthPoint,
    CollectivePoint,
    HardwareProfile,
    HostPoint,
    MatmulPoint,
    profile_for,
    shipped_profiles,
)
from estimator.time.profile_file import load_profile, profile_from_dict, profile_to_dict, save_profile

GPUS = [catalog.gpu(name) for name in catalog.gpu_names()]
HOST = Host(memory_bytes=1 << 40, n_cores=96, memory_bytes_per_s=3e11)
H100 = catalog.gpu("h100-sxm")
OPS = ("all_gather", "reduce_scatter", "all_reduce")


def matmul(m: int, n: int, k: int, dtype: str = "bf16", batch: int = 1) -> Op:
    return Op(
        "mm", "matmul", False, dtype, 2.0 * batch * m * n * k, 2 * batch * (m * k + k * n + m * n), (batch, m, n, k)
    )


def cluster(gpu: Gpu, n_gpus: int, per_node: int = 8, network: float = 5e10) -> Cluster:
    return Cluster(gpu=gpu, n_gpus=n_gpus, gpus_per_node=per_node, internode_bytes_per_s=network, host=HOST)


def collectives(gpu: Gpu, n_gpus: int, per_node: int = 8, network: float = 5e10) -> CollectiveTimer:
    return CollectiveTimer(cluster(gpu, n_gpus, per_node, network), profile_for(gpu)[0], n_gpus, per_node)


SIZE = st.integers(1, 30000)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(GPUS), SIZE, SIZE, SIZE, st.sampled_from(["bf16", "fp16", "fp32"]), st.integers(1, 4))
def test_no_operator_beats_the_roofline(gpu: Gpu, m: int, n: int, k: int, dtype: str, batch: int) -> None:
    timer = OperatorTimer(gpu, profile_for(gpu)[0], 8)
    op = matmul(m, n, k, dtype, batch)
    seconds = timer.seconds(op)
    assert seconds >= op.flops / timer.peak_flops(dtype)
    assert seconds >= op.n_bytes / gpu.memory_bytes_per_s
    add = Op("add", "elementwise", False, dtype, m * n, 6 * m * n)
    assert timer.seconds(add) >= add.n_bytes / gpu.memory_bytes_per_s


@pytest.mark.parametrize("gpu", GPUS, ids=lambda g: g.name)
def test_attention_stays_below_the_peak_and_backward_is_slower(gpu: Gpu) -> None:
    timer = OperatorTimer(gpu, profile_for(gpu)[0], 8)
    for seq_len in (128, 1024, 8192, 131072):
        for head_dim in (64, 80, 128, 256):
            flops = 2.0 * 2 * 16 * head_dim * seq_len * seq_len
            forward = Op(
                "a",
                "attention",
                False,
                "bf16",
                flops,
                8 * 2 * 16 * seq_len * head_dim,
                (2, 16, 16, seq_len, head_dim, 0),
            )
            backward = forward._replace(backward=True, flops=2.5 * flops, n_bytes=2 * forward.n_bytes)
            assert timer.seconds(forward) >= flops / timer.peak_flops("bf16")
            assert timer.seconds(backward) > timer.seconds(forward)
            if seq_len >= 8192:
                assert timer.seconds(backward) > 1.5 * timer.seconds(forward)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda g: g.name)
def test_every_gpu_of_the_catalogue_has_curves_of_its_own_architecture_or_says_whose(gpu: Gpu) -> None:
    profile, notes = profile_for(gpu)
    borrows = gpu.name in ("rtx-3090", "a10g", "rtx-5090", "mi250x", "mi355x")
    assert (profile.arch != gpu.arch) == borrows
    assert not borrows or "has no profile" in notes[0]
    for point in (*profile.matmul, *profile.attention, *profile.collectives, *profile.bandwidth, *profile.copies):
        assert profile.sources[point.source].startswith("https://"), point
    assert profile.chip is not None and profile.link is not None
    assert all(0 < e <= 1 for e in profile.chip.matmul_efficiency.values())
    assert 0 < profile.chip.memory_efficiency <= 1 and 0 < profile.link.ring_efficiency <= 1


@pytest.mark.parametrize("name", ["a100-80", "h100-sxm", "v100-16", "rtx-4090"])
def test_matmul_follows_the_published_rows_of_that_gpu(name: str) -> None:
    """bf16 and fp16, all published shapes: median within 10%, nine in ten within 55% (1024^3 is launch bound)."""
    gpu = catalog.gpu(name)
    profile, _ = profile_for(gpu)
    timer = OperatorTimer(gpu, profile, 8)
    points = [p for p in profile.matmul if p.dtype in ("bf16", "fp16")]
    errors = [
        timer.seconds(matmul(p.m, p.n, p.k, p.dtype)) / (2.0 * p.m * p.n * p.k / p.flops_per_s) - 1 for p in points
    ]
    assert len(errors) >= 10
    assert abs(statistics.median(errors)) < 0.10
    assert sorted(abs(e) for e in errors)[int(0.9 * len(errors))] < 0.55


@pytest.mark.parametrize(
    "name, n_gpus", [("a100-80", 8), ("h100-sxm", 8), ("h100-sxm", 16), ("h100-sxm", 64), ("h200", 8), ("b200", 8)]
)
def test_collectives_follow_the_published_rows(name: str, n_gpus: int) -> None:
    """Every size from 1 KiB to 16 GiB: median within 20%, nine in ten within 65%."""
    gpu = catalog.gpu(name)
    points = [p for p in profile_for(gpu)[0].collectives if p.group_size == n_gpus]
    timer = collectives(gpu, n_gpus)
    ratios = [timer.seconds(p.op, p.bytes) / p.seconds for p in points]  # type: ignore[arg-type]
    assert len(ratios) >= 5
    assert 0.8 < statistics.median(ratios) < 1.2
    assert sorted(abs(math.log(r)) for r in ratios)[int(0.9 * len(ratios))] < math.log(1.65)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(GPUS),
    st.sampled_from([2, 8, 16, 256]),
    st.sampled_from(OPS),
    st.integers(0, 1 << 36),
    st.floats(1, 8),
)
def test_collectives_are_monotone(gpu: Gpu, n_gpus: int, op: str, n_bytes: int, factor: float) -> None:
    base = collectives(gpu, n_gpus)
    seconds = base.seconds(op, n_bytes)  # type: ignore[arg-type]
    assert seconds <= base.seconds(op, int(n_bytes * factor))  # type: ignore[arg-type]
    faster = replace(gpu, link_bytes_per_s=gpu.link_bytes_per_s * factor)
    assert collectives(faster, n_gpus).seconds(op, n_bytes) <= seconds  # type: ignore[arg-type]
    assert collectives(gpu, n_gpus, network=5e10 * factor).seconds(op, n_bytes) <= seconds  # type: ignore[arg-type]
    bus = n_bytes * (n_gpus - 1) / n_gpus
    in_switch = 2 if op == "all_reduce" else 1
    assert seconds * in_switch >= bus / max(gpu.link_bytes_per_s, 8 * 5e10)


def test_nothing_to_send_and_nobody_to_send_to_are_free() -> None:
    for op in OPS:
        assert collectives(H100, 8).seconds(op, 0) == 0.0  # type: ignore[arg-type]
        assert collectives(H100, 1).seconds(op, 1 << 30) == 0.0  # type: ignore[arg-type]


def test_crossing_nodes_costs_more_and_nvlink_beats_pcie() -> None:
    for n_bytes in (1 << 20, 1 << 30):
        assert collectives(H100, 16).seconds("all_gather", n_bytes) > 1.15 * collectives(H100, 8).seconds(
            "all_gather", n_bytes
        )
    pcie = catalog.gpu("h100-pcie")
    assert collectives(pcie, 8).seconds("all_gather", 1 << 30) > 4 * collectives(H100, 8).seconds("all_gather", 1 << 30)


# ---- measured profiles ----------------------------------------------------------------------------------------------


def measured() -> HardwareProfile:
    shapes = [(64, 256, 256), (1024, 512, 2048), (512, 512, 512), (4096, 1024, 1024)]
    return HardwareProfile(
        name="cpu", arch="cpu", origin="measured", date="2026-01-01",
        gpu=replace(H100, name="cpu", arch="cpu"), host=HOST, versions={"torch": "2.13"},
        matmul=tuple(
            MatmulPoint("fp32", *s, flops_per_s=(i + 1) * 1e10 / w, workers=w, spread=0.1)
            for i, s in enumerate(shapes) for w in (1, 2)
        ),
        attention=(AttentionPoint("fp32", "forward", 512, 64, 2e10),),
        bandwidth=tuple(BandwidthPoint("elementwise", "fp32", b, r) for b, r in ((1 << 16, 2e10), (1 << 20, 3e10), (1 << 24, 1e10))),
        collectives=tuple(
            CollectivePoint(op, n, 1, b, 1e-4 * n + b * n / 4e9, dtype="fp32") for op in OPS[:2] for n in (2, 4) for b in (4096, 1 << 20)
        ),
        host_points=(HostPoint(1, 2, 3e8, 3e-6, 4e-6), HostPoint(2, 1, 1.5e8, 3e-6, 4e-6)),
        spread={"matmul": 0.1},
    )  # fmt: skip


def test_a_calibrated_machine_reproduces_its_own_points() -> None:
    profile = measured()
    assert profile.gpu is not None
    for workers in (1, 2):
        timer = OperatorTimer(profile.gpu, profile, workers)
        for p in profile.matmul:
            if p.workers == workers:
                assert timer.seconds(matmul(p.m, p.n, p.k, "fp32")) == pytest.approx(
                    2.0 * p.m * p.n * p.k / p.flops_per_s
                )
        for q in profile.bandwidth:
            op = Op("add", "elementwise", False, "fp32", 1.0, q.bytes)
            assert timer.seconds(op) == pytest.approx(q.bytes / q.bytes_per_s)
    near = OperatorTimer(profile.gpu, profile, 1).seconds(matmul(520, 520, 520, "fp32"))
    assert near == pytest.approx(2.0 * 520**3 / 3e10, rel=0.1)


def test_measured_collectives_interpolate_and_grow_with_the_group() -> None:
    profile = measured()
    assert profile.gpu is not None

    def seconds(op: str, n_bytes: int, n: int) -> float:
        return CollectiveTimer(cluster(profile.gpu, n), profile, n, 8, "fp32").seconds(op, n_bytes)  # type: ignore[arg-type]

    assert seconds("all_gather", 1 << 20, 2) == pytest.approx(2e-4 + (1 << 20) * 2 / 4e9)
    assert seconds("all_gather", 4096, 2) < seconds("all_gather", 1 << 18, 2) < seconds("all_gather", 1 << 20, 2)
    assert seconds("all_gather", 1 << 20, 2) < seconds("all_gather", 1 << 20, 3) < seconds("all_gather", 1 << 20, 4)
    assert seconds("all_gather", 1 << 20, 8) > seconds("all_gather", 1 << 20, 4)
    with pytest.raises(InputError, match="all_reduce"):
        seconds("all_reduce", 1 << 20, 2)


def test_measured_collectives_speak_for_their_own_network_only() -> None:
    gpu = catalog.gpu("h100-sxm")
    shipped = profile_for(gpu)[0]
    points = (CollectivePoint("all_gather", 8, 1, 1 << 28, 1e-3), CollectivePoint("all_gather", 8, 1, 1 << 26, 3e-4))
    profile = replace(shipped, origin="measured", collectives=points)

    def seconds(given: HardwareProfile, n: int) -> float:
        return CollectiveTimer(cluster(gpu, n), given, n, 8).seconds("all_gather", 1 << 28)

    assert seconds(profile, 8) == pytest.approx(1e-3)
    assert seconds(profile, 4) == pytest.approx(1e-3 * seconds(shipped, 4) / seconds(shipped, 8))
    assert seconds(profile, 64) == seconds(shipped, 64)  # eight nodes: none was measured
    across = replace(profile, collectives=(*points, CollectivePoint("all_gather", 16, 2, 1 << 28, 8e-3)))
    assert seconds(across, 8) == pytest.approx(1e-3)
    assert seconds(across, 64) == pytest.approx(8e-3 * seconds(shipped, 64) / seconds(shipped, 16))


def test_a_dtype_that_was_not_measured_is_refused() -> None:
    profile = measured()
    assert profile.gpu is not None
    with pytest.raises(InputError, match=r"bf16.*measured: fp32"):
        OperatorTimer(profile.gpu, profile, 1).seconds(matmul(64, 64, 64, "bf16"))


@given(
    st.lists(st.tuples(st.integers(1, 1 << 30), st.floats(1e-6, 10)), min_size=1, max_size=8),
    st.integers(1, 1 << 31),
    st.integers(1, 1 << 31),
)
def test_measured_curves_never_fall(points: list[tuple[int, float]], a: int, b: int) -> None:
    curve = seconds_curve(points)
    assert curve_seconds(curve, min(a, b)) <= curve_seconds(curve, max(a, b)) * (1 + 1e-9)


# ---- which profile --------------------------------------------------------------------------------------------------


def test_the_calibrated_profile_wins_and_a_stranger_is_named() -> None:
    own = replace(measured(), gpu=H100)
    profile, notes = profile_for(H100, own)
    assert profile.matmul == own.matmul and profile.collectives == own.collectives and notes == ()
    profile, notes = profile_for(H100, replace(own, collectives=()))
    assert profile.link is not None and "collectives were not measured" in notes[0]
    profile, notes = profile_for(H100, measured())
    assert profile.name == "h100" and "does not describe h100-sxm" in notes[0]


def test_an_unknown_gpu_borrows_from_its_architecture_and_says_so() -> None:
    profile, notes = profile_for(replace(H100, name="x9000", arch="hopper"))
    assert profile.arch == "hopper" and "x9000" in notes[0] and "no profile" in notes[0]
    with pytest.raises(InputError, match="tpu"):
        profile_for(replace(H100, name="v5", arch="tpu"))
    with pytest.raises(InputError, match="calibrate"):
        profile_for(replace(H100, name="cpu", arch="cpu"))


# ---- the file -------------------------------------------------------------------------------------------------------


def test_profiles_survive_the_file(tmp_path: Path) -> None:
    for profile in (measured(), *shipped_profiles()):
        path = save_profile(profile, tmp_path / "p.json")
        assert profile_to_dict(load_profile(path)) == profile_to_dict(profile)
    assert list(tmp_path.iterdir()) == [tmp_path / "p.json"], "no temporary file is left"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "not a hardware profile"),
        ({"origin": "guess"}, "origin"),
        ({"matmull": []}, "did you mean 'matmul'"),
        ({"matmul": 3}, "list of points"),
        ({"matmul": [{"dtype": "fp32"}]}, r"matmul\[0\] has no 'm'"),
        ({"matmul": [{"dtype": "fp32", "m": 1, "n": 1, "k": 1, "flops_per_s": -1}]}, "flops_per_s"),
        ({"matmul": [{"dtype": "fp32", "m": "x", "n": 1, "k": 1, "flops_per_s": 1}]}, "m is 'x'"),
        ({"host": {"cores": 2}}, "key"),
        ({"spread": {"matmul": "much"}}, "spread"),
        ({"notes": "text"}, "notes"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps({**profile_to_dict(measured()), **change}))
    with pytest.raises(InputError, match=message) as error:
        load_profile(path)
    assert "\n" not in str(error.value)


def test_a_corrupt_missing_or_unwritable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"format": ')
    with pytest.raises(InputError, match="not valid JSON"):
        load_profile(tmp_path / "p.json")
    with pytest.raises(InputError, match="cannot be read"):
        load_profile(tmp_path / "absent.json")
    with pytest.raises(InputError, match="cannot be written"):
        save_profile(measured(), tmp_path / "p.json" / "below" / "p.json")
    with pytest.raises(InputError, match="has no 'arch'"):
        profile_from_dict({k: v for k, v in profile_to_dict(measured()).items() if k != "arch"})
