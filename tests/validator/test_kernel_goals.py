"""Our kernels beside their rivals: ratios, goals, tables; the order in which a campaign measures them."""

from __future__ import annotations

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from estimator.units import MIB
from validator.gate.baseline import Baseline, update
from validator.gate.remeasure import kernel_case_of
from validator.kernels import implementation, measure
from validator.kernels.campaign import KernelSummary, kernel_summary_lines
from validator.kernels.case import KernelCase
from validator.kernels.files import export_kernels, import_kernels, kernel_to_json
from validator.kernels.goals import LARGE_BYTES, NORMS, Contest, contests, goals, memory_lines, table_lines
from validator.kernels.implementation import FAMILIES, IMPLEMENTATIONS
from validator.kernels.report import KernelReport
from validator.kernels.suite import expand_kernels
from validator.kernels.summary import short_name, summarise, with_forecasts
from validator.kernels.table import KERNELS
from validator.store.database import Store
from validator.suites import read_suite

H200 = {"gpu": {"name": "NVIDIA H200"}}


def report(
    kernel: str = "rms_norm", implementation: str = "cuda", seconds: float = 1.0, **changes: object
) -> KernelReport:
    """100 MiB in a second where a copy moves 100 MiB in a second."""
    fields: dict[str, object] = {
        "device": "cuda", "dtype": "bf16", "shape": (4096, 4096), "bytes": 100 * MIB, "copy_bytes_per_s": 100.0 * MIB,
        "provenance": H200,
    }  # fmt: skip
    return KernelReport(kernel=kernel, implementation=implementation, seconds=seconds, **{**fields, **changes})  # type: ignore[arg-type]


def everything(ours: float = 1.0, best: float = 1.1, fused_step: float = 1.4, peak: int = 100) -> list[KernelReport]:
    """A whole campaign in which every goal is met."""
    found = [report(entry.name, seconds=ours, backward=entry.backward) for entry in KERNELS if entry.name in FAMILIES]
    found.append(report("optimizer_step", "fused", fused_step))
    for name in (*NORMS, "cross_entropy", "linear_cross_entropy"):
        found.append(report(name, "cuda", 1.0, both=True, peak_bytes=peak))
        found.append(report(name, "torch", 2.0, both=True, peak_bytes=210))
        found.append(report(name, "compile", best, both=True, peak_bytes=110))
    return found


def statuses(reports: list[KernelReport]) -> list[str]:
    return [goal.status for goal in goals(reports)]


# ---- ratios and goals -----------------------------------------------------------------------------------------------


def test_ratios_are_of_the_same_work_on_the_same_device() -> None:
    ours, torch, fused = (
        report(),
        report(implementation="torch", seconds=3.0),
        report(implementation="fused", seconds=1.5),
    )
    elsewhere = replace(torch, provenance={"gpu": {"name": "NVIDIA A100"}}, seconds=0.1)
    smaller, backward = replace(torch, shape=(1, 1), seconds=0.1), replace(fused, backward=True, seconds=0.1)
    (first, *others) = contests([ours, torch, elsewhere, fused, smaller, backward])
    assert first.by == {"cuda": ours, "torch": torch, "fused": fused} and len(others) == 3
    assert (first.faster("torch"), first.faster("fused"), first.faster("liger"), first.best_rival) == (
        3.0,
        1.5,
        None,
        "fused",
    )
    assert Contest(by={"torch": torch}).faster("torch") is None and Contest(by={"cuda": ours}).best_rival is None


def test_goals_that_are_met() -> None:
    assert statuses(everything()) == ["met"] * 4
    streaming, step, best, memory = goals(everything())
    assert (
        "28 of 28" not in step.detail and "1 of 1, least 1.40x of fused: optimizer_step bf16 100.00 MiB" in step.detail
    )
    assert (
        "5 of 5, least 1.10x of the best" in best.detail and "not among the others: fused, liger, apex" in best.detail
    )
    assert "2 of 2, least 2.10x less than torch" in memory.detail and "least 100% of a copy" in streaming.detail


@pytest.mark.parametrize(
    ("reports", "which"),
    [
        (everything(ours=1.2), 0),
        (everything(fused_step=1.25), 1),
        (everything(best=0.99), 2),
        (everything(peak=106), 3),
    ],
)
def test_goals_that_are_not_met(reports: list[KernelReport], which: int) -> None:
    found = statuses(reports)
    assert found[which] == "not met"
    if which:
        assert found[:which] + found[which + 1 :] == ["met"] * 3


def test_what_was_not_measured_is_not_met() -> None:
    assert statuses([]) == ["not measured here"] * 4
    assert statuses([replace(r, device="cpu") for r in everything()]) == ["not measured here"] * 4
    assert statuses([replace(r, bytes=32 * MIB) for r in everything()]) == ["not measured here"] * 4
    some = [r for r in everything() if r.kernel not in ("layer_norm", "rotary")]
    assert statuses(some) == ["not measured here", "met", "not measured here", "met"]
    assert "not measured: layer_norm" in goals(some)[2].detail
    assert statuses([r for r in everything(best=0.9) if r.kernel != "layer_norm"])[2] == "not met"
    uncounted = [replace(r, peak_bytes=None) for r in everything()]
    assert statuses(uncounted)[3] == "not measured here"
    assert (
        statuses([r for r in everything() if not (r.kernel == "optimizer_step" and r.dtype != "fp32")])[1]
        == "not measured here"
    )


def test_tables_show_times_where_there_is_nothing_of_ours() -> None:
    found = contests([report(), report(implementation="fused", seconds=1.5), report("gelu", "torch", 0.25)])
    heading, first, second = table_lines(found, ("cuda", "torch", "fused"))
    assert heading.split() == ["kernel", "bytes", "ours", "GB/s", "of", "copy", "torch", "fused"]
    assert first.split() == ["rms_norm", "100.00", "MiB", "1", "s", "0.1049", "100%", "-", "1.50x"]
    assert second.split() == ["gelu", "100.00", "MiB", "-", "-", "-", "250", "ms", "-"]
    assert list(memory_lines(contests(everything()[-3:]))) == [
        "peak memory of linear_cross_entropy forward+backward: 100 B, 0.48 of torch's, 0.91 of compile's"
    ]
    on_cpu = [replace(r, device="cpu", implementation="torch", peak_bytes=None) for r in everything()[-3:]]
    assert "not counted, a CPU's allocator keeps no such number" in next(memory_lines(contests(on_cpu[-1:])))
    assert "ours was not measured" in next(memory_lines(contests(everything()[-1:])))


def test_the_summary_says_what_was_set_out_for() -> None:
    data = summarise(with_forecasts(everything()))
    assert data["against"]["rms_norm forward+backward bf16"] == {"faster": 1.1, "than": "compile"}
    assert {goal["status"] for goal in data["goals"].values()} == {"met"} and len(data["goals"]) == 4
    assert "rms_norm [cuda]" in data["of_copy"] and "linear_cross_entropy forward+backward" not in data["of_copy"]
    assert not [name for name in data["of_copy"] if "compile" in name], "rivals' shares are not the runtime's"
    assert "goals" not in summarise(with_forecasts([report(implementation="torch")]))
    told = "\n".join(kernel_summary_lines(KernelSummary(suite="kernels", kernels=data)))
    assert "rms_norm forward+backward bf16 1.10 (compile)" in told and "peak memory: met (2 of 2" in told
    assert short_name(everything()[-1]) == "linear_cross_entropy forward+backward [compile]"


# ---- records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_all_implementations_round_trip(tmp_path: Path, suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    reports = [report(implementation=name) for name in IMPLEMENTATIONS] + everything()[-3:]
    assert len({r.key for r in reports}) == len(reports)
    export_kernels(reports, tmp_path / f"kernels.{suffix}")
    assert import_kernels(tmp_path / f"kernels.{suffix}") == reports
    store = Store(tmp_path / "s.db")
    assert store.add_kernels(reports) == len(reports) and store.kernels() == reports
    assert store.kernels(implementation="liger") == [reports[4]]


def test_records_from_before_these_fields_load() -> None:
    old = json.loads(kernel_to_json(report()))
    del old["both"], old["peak_bytes"]
    assert KernelReport.from_dict(old) == report() and KernelReport.from_dict(old).key == report().key
    assert replace(report(), both=True).key != report().key


@pytest.mark.parametrize("mib", [1, 32, 100])
def test_the_gate_measures_the_same_size_again(mib: float) -> None:
    """Whatever the implementation counts: the shape is what the case asked for."""
    for entry in KERNELS:
        which = "cuda" if entry.name in FAMILIES else "torch"
        case = KernelCase(
            kernel=entry.name, backward=entry.backward, both=entry.both, dtype=entry.dtypes[0], n_bytes=round(mib * MIB),
            implementation=which, device="cuda",  # type: ignore[arg-type]
        )  # fmt: skip
        counted = entry.n_bytes(case.shape, case.dtype, which)
        measured = case.report(bytes=counted, counted_bytes=counted, seconds=1.0, copy_bytes_per_s=1.0, provenance=H200)
        (place,) = update(Baseline(), [measured], {}).environments
        again = kernel_case_of(place.cases[0])
        assert (again.key, again.shape, again.both) == (case.key, case.shape, case.both), case.label


# ---- order --------------------------------------------------------------------------------------------------------


def test_a_campaign_holds_ours_against_its_rivals_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "find_spec", lambda module: object())
    cases = expand_kernels(*read_suite("kernels")).cases
    groups: list[list[KernelCase]] = []
    for case in cases:
        what = (case.kernel, case.backward, case.both, case.dtype, case.shape)
        if groups and what == tuple(
            getattr(groups[-1][0], k) for k in ("kernel", "backward", "both", "dtype", "shape")
        ):
            groups[-1].append(case)
        else:
            groups.append([case])
    order = [[case.implementation for case in group] for group in groups]
    assert all(o == sorted(o, key=IMPLEMENTATIONS.index) for o in order), "ours first, all of one size in a row"
    with_rivals = [bool({"fused", "compile", "liger", "apex"} & set(o)) and "cuda" in o for o in order]
    assert with_rivals == sorted(with_rivals, reverse=True) and 30 < sum(with_rivals) < 45
    has_ours = ["cuda" in o for o in order]
    assert has_ours == sorted(has_ours, reverse=True)
    both = {group[0].kernel for group, o in zip(groups, order, strict=True) if group[0].both and len(o) >= 4}
    assert both == {*NORMS, "cross_entropy", "linear_cross_entropy"}
    large = {
        (c.kernel, c.both)
        for c in cases
        if c.implementation == "cuda" and c.entry.n_bytes(c.shape, c.dtype, "cuda") >= 1.1 * LARGE_BYTES
    }
    assert large == {(name, False) for name in FAMILIES if name != "linear_cross_entropy"} | {
        (name, True) for name in both
    }


# ---- the script -----------------------------------------------------------------------------------------------------


def run_bench(monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", "--mib", "0.5", "--dtype", "fp32", *flags])
    runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "bench_kernels.py"), run_name="__main__")


def test_the_bench_prints_every_goal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("COPY_BYTES", "_FLUSH_BYTES"):
        monkeypatch.setattr(measure, name, {"cpu": MIB})
    monkeypatch.setattr(measure, "_WARM_UP_S", 0.01)
    run_bench(monkeypatch, "--kernels", "rms_norm,cross_entropy", "--implementations", "cuda,torch,fused")
    lines = capsys.readouterr().out.splitlines()
    rows = [line[:38].strip() for line in lines if line.startswith(("rms_norm", "cross_entropy ", "cross_entropy_"))]
    expected = [name + way for name in ("rms_norm", "cross_entropy") for way in ("", " backward", " forward+backward")]
    assert rows == expected and "fused" in lines[1] and "apex" not in lines[1]
    assert [line.count("not measured here") for line in lines[-4:]] == [1] * 4
    assert "peak memory of cross_entropy forward+backward: not counted" in "\n".join(lines)
    with pytest.raises(SystemExit) as ended:
        run_bench(monkeypatch, "--kernels", "rmsnorm")
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and "kernel is 'rmsnorm'" in err and out == ""
