"""Kernel records in the baseline: bandwidth, judged by the same test; and files of the first version."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from estimator.errors import InputError
from validator.gate.baseline import Baseline, load_baseline, save_baseline, update
from validator.gate.decide import check
from validator.gate.records import read_records
from validator.gate.remeasure import kernel_case_of, remeasure
from validator.kernels.case import KernelCase
from validator.kernels.report import KernelReport
from validator.store.database import Store

CASE = KernelCase(kernel="copy", dtype="fp32", n_bytes=1 << 20)
PLACE = {"torch": "2.13.0", "host": "node1", "cpu": "a cpu"}


def kernels(seed: int, factor: float = 1.0, copy: float = 1e10, n: int = 5, device: str = "cpu") -> list[KernelReport]:
    rng = np.random.default_rng(seed)
    seconds = [float(s) for s in 1e-4 * factor * np.exp(rng.normal(0, 0.003, n))]
    made = [
        CASE.report(bytes=1 << 20, counted_bytes=1 << 20, seconds=s, copy_bytes_per_s=copy, provenance={**PLACE, "date_utc": f"{seed}-{i}"})
        for i, s in enumerate(seconds)
    ]  # fmt: skip
    return [replace(k, device=device) for k in made]  # type: ignore[arg-type]


def verdict(old: list[KernelReport], new: list[KernelReport]):
    (place,) = update(Baseline(), old, {}).environments
    (found,) = check(place.cases, new).verdicts
    return found


def test_bandwidth_is_judged_and_more_is_better() -> None:
    slow = verdict(kernels(0), kernels(1, 1.08))
    assert (slow.metric, slow.status) == ("kernel_bytes_per_s", "regressed") and slow.change == pytest.approx(
        -0.074, abs=0.01
    )
    assert slow.baseline == pytest.approx((1 << 20) / 1e-4, rel=0.01) and "GB/s" in slow.reason
    assert verdict(kernels(0), kernels(1)).status == "pass"
    assert verdict(kernels(0), kernels(1, 0.9)).status == "improved"
    assert verdict(kernels(0), kernels(1, n=2)).status == "inconclusive"


def test_on_a_cpu_the_copy_of_the_same_process_says_how_fast_the_machine_was() -> None:
    both = verdict(kernels(0), kernels(1, 1.1, copy=1e10 / 1.1))
    assert both.status == "pass" and both.machine == pytest.approx(0.1) and both.taken_out
    on_gpu = verdict(kernels(0, device="cuda"), kernels(1, 1.1, copy=1e10 / 1.1, device="cuda"))
    assert on_gpu.status == "regressed" and on_gpu.machine is None


def test_files_keep_kernels_and_they_are_measured_again(tmp_path: Path) -> None:
    baseline = update(Baseline(), kernels(0), {})
    save_baseline(baseline, tmp_path / "b.json")
    assert load_baseline(tmp_path / "b.json") == baseline
    (case,) = baseline.environments[0].cases
    assert (case.kind, case.origin, case.name) == ("kernel", "kernel", CASE.label)
    assert kernel_case_of(case) == CASE
    started = []

    class Remote:
        def measure(self, asked: KernelCase, limit_s: float) -> KernelReport:
            assert asked == CASE and limit_s > 0
            return kernels(9, n=1)[0]

    @contextmanager
    def remote():
        started.append(1)
        yield Remote()

    assert len(list(remeasure([case], 3, kernels=remote))) == 3 and len(started) == 3  # a process for each round
    for damage, says in (({"kernel": "nothing"}, "cannot be measured"), ({"n_bytes": 1 << 24}, "it was measured with")):
        with pytest.raises(InputError, match=says):
            kernel_case_of(replace(case, job={**case.job, **damage}))


def test_kernel_record_files(tmp_path: Path, zerocast) -> None:
    for name, seed, factor in (("old", 0, 1.0), ("same", 1, 1.0), ("slow", 2, 1.08)):
        lines = [json.dumps(k.to_dict()) + "\n" for k in kernels(seed, factor)]
        (tmp_path / f"{name}.kernels.jsonl").write_text("".join(lines), encoding="utf-8")
    flags = ("check", "--baseline", tmp_path / "b.json", "--records")
    assert zerocast(*flags, tmp_path / "old.kernels.jsonl", "--update").code == 0
    assert zerocast(*flags, tmp_path / "same.kernels.jsonl").code == 0
    slow = zerocast(*flags, tmp_path / "slow.kernels.jsonl")
    assert slow.code == 1 and "kernel_bytes_per_s regressed" in slow.err
    none = zerocast(*flags, tmp_path / "slow.kernels.jsonl", "--metric", "step_s")
    assert none.code == 2 and "none of the metrics step_s" in none.err
    (tmp_path / "cut.kernels.jsonl").write_text('{"kernel": "copy", "se', encoding="utf-8")
    (tmp_path / "zero.kernels.jsonl").write_text('{"kernel": "copy"}\n', encoding="utf-8")
    for name, says in (("cut", "line 1"), ("zero", "line 1.* is 0")):
        with pytest.raises(InputError, match=says):
            read_records(tmp_path / f"{name}.kernels.jsonl")
    store = Store(tmp_path / "s.db")
    store.add_kernels(kernels(2, 1.08))
    slow = zerocast("check", "--baseline", tmp_path / "b.json", "--store", tmp_path / "s.db")
    assert slow.code == 1 and "kernel_bytes_per_s regressed" in slow.err


def test_a_file_of_the_first_version_loads_and_is_written_as_the_second(tmp_path: Path, make_report) -> None:
    baseline = update(Baseline(), [make_report()], {})
    file = tmp_path / "b.json"
    save_baseline(baseline, file)
    data = json.loads(file.read_text(encoding="utf-8"))
    case = data["environments"][0]["cases"][0]
    del case["kind"]
    for name in ("tokens_per_s", "commit"):
        case["runs"][0].setdefault(name, None)  # version 1 wrote what it did not know as null
    data["zerocast_baseline"] = 1
    file.write_text(json.dumps(data), encoding="utf-8")
    assert load_baseline(file) == baseline
    save_baseline(load_baseline(file), file)
    assert json.loads(file.read_text(encoding="utf-8"))["zerocast_baseline"] == 2
    case["kind"] = "kernal"
    file.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError, match="did you mean 'kernel'"):
        load_baseline(file)
