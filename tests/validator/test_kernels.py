"""Kernels: what is counted is what is touched; campaigns survive crashes, kills and the end of the budget."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from estimator.errors import InputError
from estimator.ops import streaming
from estimator.ops.operator import Op
from estimator.time.operators import OperatorTimer
from estimator.time.profile import profile_for
from estimator.units import MIB
from validator.__main__ import main
from validator.kernels import calls
from validator.kernels import campaign as kernel_campaign
from validator.kernels.campaign import kernel_summary_lines, run_kernel_campaign
from validator.kernels.case import KernelCase
from validator.kernels.files import import_kernels
from validator.kernels.implementation import FAMILIES, NOT_IN_TORCH
from validator.kernels.remote import Remote
from validator.kernels.report import KernelReport
from validator.kernels.suite import KernelPlan, expand_kernels
from validator.kernels.summary import summarise, with_forecasts
from validator.kernels.table import KERNELS, NAMES, kernel, vocabulary
from validator.measure.runner import MeasureError
from validator.provenance import cpu_model
from validator.suites import load_suite, read_suite

# ---- the table ------------------------------------------------------------------------------------------------------

FEWER = {
    "swiglu": (3 / 5, 5 / 9), "geglu": (3 / 5, 5 / 9), "add_rms_norm": (4 / 5, 4 / 6), "add_layer_norm": (4 / 5, 4 / 6),
    "embedding": (1, 5 / 9), "cross_entropy": (2 / 14, 4 / 22), "optimizer_step": (28 / 48, None), "sgd": (20 / 40, None),
}  # fmt: skip
"""Bytes that a single pass needs over those that the estimator counts, in bf16, where the plain body takes several passes
(gate and up read, result written: 3 of 5; logits read once instead of copied to fp32, ...). Elsewhere it is one."""
STREAMING = [entry for entry in KERNELS if entry.name != "linear_cross_entropy"]
name_of = lambda k: f"{k.name}{'-backward' if k.backward else ''}"  # noqa: E731


def made(entry, shape, dtype, device, implementation):
    """As ``Kernel.prepare``, on any device: ``meta`` stands for a GPU, and on a CPU our own functions are their references."""
    make = calls.Make(shape, dtype, device, implementation)
    return calls.prepared(entry, calls.bound(entry.name, make), make, entry.ops(shape, dtype, implementation))


@pytest.mark.parametrize("entry", [e for e in STREAMING if e.name not in NOT_IN_TORCH], ids=name_of)
def test_what_is_counted_is_what_is_touched(entry):
    """The operands that the runtime's own function gets, against the estimator's operator table."""
    dtype = entry.dtypes[0]
    prepared = entry.prepare((256, 512), dtype, "cpu")
    prepared.call()
    expected = FEWER.get(entry.name, (1, 1))[entry.backward]
    assert prepared.least_bytes / prepared.n_bytes == pytest.approx(expected, rel=0.08)  # tables, weights, labels
    assert prepared.least_bytes <= 1.08 * prepared.n_bytes


@pytest.mark.parametrize("entry", [e for e in STREAMING if e.name in FAMILIES], ids=name_of)
def test_our_own_kernels_count_one_pass(entry):
    """Operands and results of the runtime's kernels against their entries; LAMB reads 12 of its bytes twice."""
    prepared = made(entry, (32768, 512), entry.dtypes[0], "meta", "cuda")
    if prepared.before is not None:
        prepared.before()
    prepared.call()
    expected = 28 / 40 if entry.name == "lamb" else 1
    assert prepared.least_bytes / prepared.n_bytes == pytest.approx(expected, rel=0.09)  # partial sums, statistics
    names = {op.name.removesuffix("_backward") for op in prepared.ops}
    assert len(prepared.ops) == 1 and names & {FAMILIES[entry.name], entry.name, "bucket_copy", f"{FAMILIES[entry.name]}_step",
                                               entry.name.removesuffix("_int8"), "dequantize_sum"}  # fmt: skip


def test_the_head_counts_products_of_either_body():
    entry, n = kernel("linear_cross_entropy", both=True), 2 * 64 * 128 * vocabulary(128)
    assert [
        sum(op.flops for op in entry.ops((64, 128), "bf16", i) if op.kind == "matmul") for i in ("torch", "cuda")
    ] == [3 * n] * 2
    with pytest.raises(InputError, match="one of forward and backward together; allowed: both"):
        kernel("linear_cross_entropy")


def test_hand_counted_bytes():
    n = 64 * 128
    counts = {
        ("add", False, "bf16"): 3 * 2 * n, ("gelu", True, "fp32"): 3 * 4 * n, ("rms_norm", False, "fp16"): 2 * 2 * n,
        ("adamw", False, "fp32"): 28 * n, ("optimizer_step", False, "bf16"): (6 + 8 + 6 + 28) * n,
        ("grad_norm", False, "fp32"): 4 * n, ("cast_to_fp32", False, "bf16"): 6 * n, ("copy", False, "bf16"): 4 * n,
    }  # fmt: skip
    for (name, backward, dtype), n_bytes in counts.items():
        assert kernel(name, backward).n_bytes((64, 128), dtype) == n_bytes, name
    assert kernel("rms_norm", both=True).n_bytes((64, 128), "bf16") == (2 + 3) * 2 * n
    for optimizer, states in (("adamw", 2), ("sgd", 1), ("lion", 1), ("adagrad", 1)):
        assert streaming.fused_step(optimizer, 3).n_bytes == 3 * (4 + 8 * (states + 1))


@pytest.mark.parametrize("n_bytes", [64 << 10, 5_000_001, 1 << 30])
def test_sizes_are_met(n_bytes):
    for entry in (*KERNELS, *(kernel(name, both=True) for name in ("rms_norm", "cross_entropy"))):
        for dtype in entry.dtypes:
            shape = entry.shape_for(n_bytes, dtype)
            if not entry.has_weight or n_bytes > MIB:  # the smallest head there is moves 3 MB
                assert entry.n_bytes(shape, dtype) == pytest.approx(n_bytes, rel=0.3 if n_bytes < MIB else 0.05), entry
            assert shape[1] <= entry.max_width and shape[1] % 64 == 0
            assert entry.shape_for(entry.size_of(shape, dtype), dtype) == shape


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_computes_finite_numbers(name):
    import torch

    for entry in KERNELS:
        if entry.name == name:
            result = made(entry, (64, 128), entry.dtypes[-1], "cpu", "cuda" if name in NOT_IN_TORCH else "torch").call()
            tensors = result if isinstance(result, tuple | list) else [result]
            assert all(torch.isfinite(t.float()).all() for t in tensors if isinstance(t, torch.Tensor))


def test_what_does_not_exist_is_refused():
    with pytest.raises(InputError, match=r"kernel is 'rmsnorm'.*did you mean 'rms_norm'"):
        kernel("rmsnorm")
    with pytest.raises(InputError, match="kernel 'copy' has no backward pass"):
        kernel("copy", True)
    with pytest.raises(InputError, match=r"dtype is 'bf16'; allowed: fp32"):
        KernelCase(kernel="adamw", dtype="bf16")
    with pytest.raises(InputError, match="backward and both; allowed: one of them"):
        kernel("rms_norm", True, True)


# ---- suites ---------------------------------------------------------------------------------------------------------


def test_the_shipped_suites():
    gpu, cpu = (expand_kernels(*read_suite(name)) for name in ("kernels", "kernels-cpu"))
    assert gpu.about and cpu.about and gpu.needs_gpu and not cpu.needs_gpu
    assert {c.kernel for c in gpu.cases} == set(NAMES)
    assert {c.kernel for c in cpu.cases} == set(NAMES) - {*NOT_IN_TORCH, "linear_cross_entropy"}
    assert {c.device for c in cpu.cases} == {"cpu"} and {c.implementation for c in cpu.cases} == {"torch"}
    assert len({c.key for c in gpu.cases}) == len(gpu.cases) > 200
    assert {item.reason for item in cpu.left_out} == {
        "the kernel has no backward pass of its own", "the kernel does not take dtype 'fp32'", "the kernel does not take dtype 'bf16'",
        "implementation is 'torch', and torch has no such operator as it", "the kernel is one of forward and backward together; allowed: both",
    }  # fmt: skip
    with pytest.raises(InputError, match="suite 'kernels' measures kernels"):
        load_suite("kernels")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"kernel": ["copy", "gelo"]}, r"kernel is 'gelo'.*did you mean 'gelu'"), ({"mib": 0}, "mib is 0"), ({"dtype": "fp8"}, "dtype is 'fp8'"),
     ({"gpu": "h200"}, "gpu is 'h200'; allowed: cpu, here"), ({"sizes": 3}, "sizes"), ({"backward": 1}, "backward is 1"), ({"mib": []}, "empty"),
     ({"both": "yes"}, "both is 'yes'"), ({"implementation": "cudnn"}, "implementation is 'cudnn'")],
)  # fmt: skip
def test_a_misspelled_suite_is_refused(change, complaint):
    data = {"measure": "kernels", "gpu": "cpu", "kernel": "copy", "dtype": "fp32", "mib": 1, **change}
    with pytest.raises(InputError, match=complaint):
        expand_kernels("mine", data)


def test_a_misspelled_measure_is_refused(tmp_path):
    (tmp_path / "m.toml").write_text('measure = "kernel"\n')
    with pytest.raises(InputError, match="did you mean 'kernels'"):
        read_suite(str(tmp_path / "m.toml"))


# ---- campaigns ------------------------------------------------------------------------------------------------------

CPU = cpu_model() or ""
PLAN = KernelPlan(
    suite="test",
    cases=tuple(KernelCase(kernel=k, dtype="fp32", n_bytes=1 << 16) for k in ("add", "rotary", "copy", "gelu")),
)


def record(case, **changes):
    return case.report(
        **{"bytes": 1000, "seconds": 0.5, "copy_bytes_per_s": 4000.0, "provenance": {"cpu": CPU}, **changes}
    )


class Quick(Remote):
    """Answers at once; ``failing`` maps kernels to errors."""

    def __init__(self, **failing):
        super().__init__()
        self.asked, self.failing = [], failing

    def measure(self, case, limit_s):
        self.asked.append(case.kernel)
        if case.kernel in self.failing:
            raise self.failing[case.kernel]
        return record(case)


def run(plan, folder, remote, budget_s=60.0):
    lines: list[str] = []
    return run_kernel_campaign(plan, folder, budget_s, lines.append, remote=remote), lines


def test_a_campaign_records_skips_and_tries_failures_last(tmp_path):
    quick = Quick(add=MeasureError("it crashed"))
    summary, lines = run(PLAN, tmp_path, quick)
    assert (summary.measured, summary.failed, summary.recorded, quick.asked) == (
        3,
        1,
        0,
        ["add", "rotary", "copy", "gelu"],
    )
    assert "add fp32" in lines[0] and lines[0].endswith("failed: it crashed") and "2000 B/s" not in lines[1]
    assert "500 ms, 2e-06 GB/s, 50% of a copy" in lines[1]
    more = replace(PLAN, cases=(*PLAN.cases, KernelCase(kernel="swiglu", dtype="fp32")))
    again = Quick()
    summary, _ = run(more, tmp_path, again)
    assert again.asked == ["swiglu", "add"] and (summary.recorded, summary.measured) == (3, 2)
    assert len(import_kernels(tmp_path / "kernels.jsonl")) == 5
    told = list(kernel_summary_lines(summary))
    assert "2 measured, 3 recorded before, 0 failed" in told[0] and "median of 5 kernels 50%" in told[1]
    assert json.loads((tmp_path / "summary.json").read_text())["kernels"]["worst"] == "add"


def test_another_machines_records_are_not_this_ones(tmp_path):
    class Elsewhere(Quick):
        def measure(self, case, limit_s):
            return record(case, provenance={"cpu": "another processor"})

    run(PLAN, tmp_path, Elsewhere())
    assert run(PLAN, tmp_path, Quick())[0].measured == 4


def test_the_budget_and_the_place(tmp_path, monkeypatch):
    class Slow(Quick):
        def measure(self, case, limit_s):
            time.sleep(0.3)
            return super().measure(case, limit_s)

    monkeypatch.setattr(kernel_campaign, "SHORTEST_S", 0.2)
    summary, _ = run(PLAN, tmp_path, Slow(), budget_s=0.6)
    assert summary.measured in (1, 2) and summary.measured + summary.remain == 4
    with pytest.raises(InputError, match="budget_s is 0"):
        run(PLAN, tmp_path, Quick(), budget_s=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used"):
        run(PLAN, tmp_path / "file", Quick())
    gpu = KernelPlan(suite="kernels", cases=(KernelCase(kernel="copy", device="cuda"),))
    with pytest.raises(InputError, match=r"suite 'kernels' needs a GPU .*kernels-cpu"):
        run(gpu, tmp_path, Quick())


ODD = """
import os, sys, time
from validator.kernels import measure, worker
class Bench(measure.Bench):
    def __post_init__(self):
        self.origin = {"cpu": "test"}
        print("a library prints to stdout")
    def measure(self, case):
        if case.kernel == "add":
            os.abort()
        if case.kernel == "rotary":
            raise MemoryError("out of memory")
        if case.kernel == "copy":
            time.sleep(60)
        if case.kernel == "swiglu":
            raise RuntimeError("illegal address")
        return case.report(bytes=os.getpid(), seconds=1.0, copy_bytes_per_s=1.0)
measure.Bench = Bench
worker.main()
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs a Unix")
def test_a_crash_a_hang_and_a_lack_of_memory_cost_one_kernel_each(tmp_path, monkeypatch):
    (tmp_path / "odd_kernels.py").write_text(ODD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cases = {
        k: KernelCase(kernel=k, dtype="fp32", n_bytes=1 << 16) for k in ("add", "rotary", "copy", "gelu", "swiglu")
    }
    with Remote("odd_kernels") as remote:
        with pytest.raises(MeasureError, match="the process crashed, killed by SIGABRT"):
            remote.measure(cases["add"], 60)
        first = remote.measure(cases["gelu"], 60)
        with pytest.raises(MeasureError, match="out of memory"):
            remote.measure(cases["rotary"], 60)
        assert remote.is_running and remote.measure(cases["gelu"], 60).bytes == first.bytes  # the same process
        with pytest.raises(MeasureError, match="RuntimeError: illegal address"):
            remote.measure(cases["swiglu"], 60)
        assert not remote.is_running  # its device may be in any state
        with pytest.raises(MeasureError, match=r"ran past its limit of 0.5 s"):
            remote.measure(cases["copy"], 0.5)
        last = remote.measure(cases["gelu"], 60)
        assert last.bytes != first.bytes
    assert not Path(f"/proc/{last.bytes}").exists()


KILLED = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_kernels import Quick, record
from validator.kernels.campaign import run_kernel_campaign
from validator.kernels.case import KernelCase
from validator.kernels.suite import KernelPlan
plan = KernelPlan(suite="k", cases=tuple(KernelCase(kernel="copy", dtype="fp32", n_bytes=4096 * n) for n in range(1, 3001)))
run_kernel_campaign(plan, Path(sys.argv[1]), 600.0, lambda line: print(line, flush=True), remote=Quick())
"""


def test_a_killed_campaign_has_all_that_it_told_of(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = [process.stdout.readline() for _ in range(40)]
    process.send_signal(signal.SIGKILL)
    told += [line for line in process.stdout.read().split("\n") if line.endswith("of a copy")]
    process.wait()
    process.stdout.close()
    path = tmp_path / "kernels.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0].count(b"\n") + 1
    assert 40 <= len(told) <= whole <= len(told) + 1
    cases = tuple(KernelCase(kernel="copy", dtype="fp32", n_bytes=4096 * n) for n in range(1, len(told) + 2))
    summary, _ = run(KernelPlan(suite="k", cases=cases), tmp_path, Quick())
    assert summary.recorded >= len(told) and summary.recorded + summary.measured == len(told) + 1


# ---- forecasts ------------------------------------------------------------------------------------------------------


def test_the_forecast_is_the_time_models_own():
    from estimator import catalog

    case = KernelCase(kernel="swiglu", dtype="bf16", n_bytes=64 * MIB, device="cuda")
    report = record(case, provenance={"gpu": {"name": "NVIDIA H200"}})
    ours, unknown = (replace(report, implementation="cuda"), replace(report, provenance={"gpu": {"name": "Voodoo 5"}}))
    local = record(replace(case, device="cpu"))
    rows = with_forecasts([report, ours, unknown, local, replace(report, implementation="liger")])
    gpu = catalog.gpu("h200")
    op = Op("gated_activation", "elementwise", False, "bf16", 0.0, kernel("swiglu").n_bytes(case.shape, "bf16"))
    expected = OperatorTimer(gpu, profile_for(gpu)[0]).seconds(op)
    assert rows[0].forecast_s == pytest.approx(expected) and rows[0].error == pytest.approx(expected / 0.5 - 1)
    fewer = OperatorTimer(gpu, profile_for(gpu)[0]).seconds(op._replace(n_bytes=op.n_bytes * 3 // 5))
    assert rows[1].forecast_s == pytest.approx(fewer)  # gate and up read once
    assert [row.forecast_s for row in rows[2:]] == [None] * 3
    assert "Voodoo" in rows[2].why and "calibrate" in rows[3].why and "liger" in rows[4].why
    summary = summarise(rows)
    assert summary["forecast"]["n"] == 2 and sum(summary["no_forecast"].values()) == 3


def test_shares_are_taken_at_the_largest_size():
    def at(kernel_name: str, n_bytes: int, seconds: float) -> KernelReport:
        return KernelReport(kernel=kernel_name, bytes=n_bytes, seconds=seconds, copy_bytes_per_s=100.0, dtype="fp32")

    rows = with_forecasts([at("add", 10, 1.0), at("add", 100, 1.25), at("gelu", 100, 2.0)])
    summary = summarise(rows)
    assert summary["of_copy"] == {"add": 0.8, "gelu": 0.5} and summary["worst"] == "gelu"
    assert summary["median_of_copy"] == 0.65
    assert summarise([]) == {"n": 0, "of_copy": {}, "no_forecast": {}}


# ---- for real -------------------------------------------------------------------------------------------------------

SMALL = 'measure = "kernels"\ngpu = "cpu"\nkernel = ["copy", "rms_norm"]\nbackward = [false, true]\ndtype = "fp32"\nmib = 0.5\n'


def test_a_campaign_on_this_processor(tmp_path, capsys):
    (tmp_path / "small.toml").write_text(SMALL)
    command = ["campaign", "--suite", str(tmp_path / "small.toml"), "--out", str(tmp_path / "out")]
    assert main([*command, "--dry-run"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed["cases"]) == 3 and len(listed["left_out"]) == 1 and not (tmp_path / "out").exists()
    assert main([*command, "--budget-s", "120"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["measured"] == 3 and "rms_norm backward fp32" in err and "% of a copy" in err
    reports = import_kernels(tmp_path / "out" / "kernels.jsonl")
    assert {(r.kernel, r.backward) for r in reports} == {("copy", False), ("rms_norm", False), ("rms_norm", True)}
    for r in reports:
        assert 0 < r.low_s <= r.seconds <= r.high_s and r.repeats >= 7 and r.copy_bytes_per_s > 0
        assert r.provenance["torch"] and r.device_name == CPU
    assert main([*command, "--budget-s", "120"]) == 0
    assert json.loads(capsys.readouterr().out)["recorded"] == 3


def test_the_gpu_suite_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("validator.__main__.device_here", lambda: None)
    assert main(["campaign", "--suite", "kernels", "--out", str(tmp_path / "x")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "suite 'kernels' needs a GPU" in err and err.count("\n") == 1 and not (tmp_path / "x").exists()
