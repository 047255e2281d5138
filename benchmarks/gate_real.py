"""The gate on real runs: how far runs spread, false alarms of unchanged code, and injected losses that are found.

One small training step on one core. First the baseline's runs; then unchanged and slowed runs in turn (A B B A ...), which are
dealt out to gates in the order in which they were measured; then runs with one more live tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from estimator.job import Cluster, Gpu, Host, Job, ModelSpec, Strategy, Workload
from estimator.report import StepReport
from validator.gate.baseline import Baseline, BaselineCase, Run, run_of, update
from validator.gate.decide import Gate, check, check_runs
from validator.gate.pace import at_one_pace
from validator.measure import runner
from validator.measure.case import Case

HERE = Path(__file__).resolve().parent
N_BASELINE, N_NEW, N_PAIRS = 12, 3, 8
SLOWER, GROWTH = 0.05, 0.01


@dataclass(kw_only=True)
class Runs:
    """What was measured, in order."""

    baseline: list[StepReport] = field(default_factory=list)
    same: list[StepReport] = field(default_factory=list)
    slower: list[StepReport] = field(default_factory=list)
    """One for each of ``same``, measured right before or after it."""
    fatter: list[StepReport] = field(default_factory=list)


def job() -> Job:
    """About 4M parameters; the cluster's figures matter to forecasts alone."""
    gpu = Gpu(
        name="this CPU", arch="cpu", memory_bytes=8 << 30, memory_bytes_per_s=1e10, peak_flops={"fp32": 1e11}, n_sms=1, l2_bytes=1 << 20,
        link_bytes_per_s=1e9, host_link_bytes_per_s=1e9,
    )  # fmt: skip
    model = ModelSpec(
        name="gate-4m", family="custom", n_layers=4, d_model=256, n_heads=4, n_kv_heads=4, head_dim=64, d_ff=1024, vocab_size=2048,
        max_positions=128,
    )  # fmt: skip
    return Job(
        model=model,
        workload=Workload(seq_len=128, micro_batch_size=1, global_batch_size=1),
        strategy=Strategy(zero_stage=0, dtype="fp32"),
        cluster=Cluster(
            gpu=gpu, n_gpus=1, gpus_per_node=1, internode_bytes_per_s=1e9,
            host=Host(memory_bytes=8 << 30, n_cores=1, memory_bytes_per_s=1e10),
        ),
    )  # fmt: skip


def measure_one(slower: float = 0.0, more_bytes: int = 0) -> StepReport:
    """One run in a process of its own."""
    os.environ.update(SLOWER=str(slower), MORE_BYTES=str(more_bytes))
    return runner.measure(Case(job=job(), backend="cpu", steps=16, warmup=3, time_limit_s=300))


def measure_all(budget_s: float, n_gates: int) -> Runs:
    """As much as fits into ``budget_s`` after the baseline."""
    runner.WORKER = "slow_worker"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    started, runs = time.monotonic(), Runs()
    for _ in range(N_BASELINE):
        runs.baseline.append(measure_one())
    for number in range(n_gates * N_NEW):
        if time.monotonic() - started > budget_s:
            break
        for slower in (False, True) if number % 2 == 0 else (True, False):
            (runs.slower if slower else runs.same).append(measure_one(SLOWER if slower else 0.0))
    grown = round(GROWTH * (runs.baseline[0].peak_allocated_bytes or 0))
    runs.fatter += [measure_one(more_bytes=grown) for _ in range(N_NEW)]
    return runs


def gates(case: BaselineCase, reports: Sequence[StepReport], metric: str, n_new: int = N_NEW) -> Iterator[Gate]:
    """One gate for every ``n_new`` of ``reports``."""
    for start in range(0, len(reports) - n_new + 1, n_new):
        yield check([case], reports[start : start + n_new], metrics=[metric])


def paired(case: BaselineCase, pairs: Sequence[tuple[StepReport, StepReport]]) -> Iterator[str]:
    """The verdict of every ``N_PAIRS`` pairs (old, new)."""
    for start in range(0, len(pairs) - N_PAIRS + 1, N_PAIRS):
        part = pairs[start : start + N_PAIRS]
        before = replace(case, runs=tuple(run_of(a) for a, _ in part))
        yield check_runs(before, [run_of(b) for _, b in part], metrics=["step_s"], paired=True)[0].status


def neighbours(reports: Sequence[StepReport]) -> list[tuple[StepReport, StepReport]]:
    """Unchanged code beside unchanged code, the order turned from pair to pair."""
    pairs = list(zip(reports[::2], reports[1::2], strict=False))
    return [(b, a) if number % 2 else (a, b) for number, (a, b) in enumerate(pairs)]


def spread(values: Sequence[float]) -> float:
    """Standard deviation of logarithms."""
    return float(np.std(np.log(values), ddof=1))


def steps_s(runs: Sequence[Run]) -> list[float]:
    return [run.step_s for run in runs if run.step_s is not None]


def without_yardstick(report: StepReport) -> StepReport:
    return replace(report, provenance={k: v for k, v in report.provenance.items() if not k.startswith("yardstick")})


def tell(runs: Runs) -> None:
    """Prints what the runs show."""
    (place,) = update(Baseline(), runs.baseline, {}).environments
    (plain,) = update(Baseline(), [without_yardstick(r) for r in runs.baseline], {}).environments
    case, plain_case = place.cases[0], plain.cases[0]
    unchanged = [run_of(r) for r in (*runs.baseline, *runs.same)]
    level, _, _ = at_one_pace(unchanged, unchanged)
    raw, yardsticks = steps_s(unchanged), [r.yardstick_s for r in unchanged if r.yardstick_s]
    print(
        f"{len(unchanged)} unchanged runs: median step {1e3 * statistics.median(raw):.1f} ms, yardstick {1e3 * statistics.median(yardsticks):.2f} ms"
    )
    print(
        f"spread of run medians (standard deviation of logarithms): as measured {spread(raw):.1%}, by yardstick {spread(steps_s(level)):.1%}"
    )
    slope = np.polyfit(np.log(yardsticks), np.log(raw), 1)[0] if spread(yardsticks) > 0 else float("nan")
    print(
        f"where the yardstick takes 1 % longer, the step takes {slope:.2f} % longer (least squares over runs; 1 is perfect tracking)"
    )
    print(f"\n{'':<44}{'gates':>6}{'regressed':>11}{'improved':>10}{'inconcl.':>10}{'pass':>6}")
    for n_new in (N_NEW, 2 * N_NEW):
        for name, reports in (("unchanged", runs.same), (f"{SLOWER:.0%} slower", runs.slower)):
            found = gates(case, reports, "step_s", n_new)
            _row(f"{name}, {N_BASELINE} old and {n_new} new runs", [g.verdicts[0].status for g in found])
            plain = gates(plain_case, [without_yardstick(r) for r in reports], "step_s", n_new)
            _row("  the same without the yardstick", [g.verdicts[0].status for g in plain])
    _row(
        f"unchanged, {N_PAIRS} pairs measured in turn",
        [*paired(case, neighbours(runs.same)), *paired(case, neighbours(runs.slower))],
    )
    _row(
        f"{SLOWER:.0%} slower, {N_PAIRS} pairs measured in turn",
        list(paired(case, list(zip(runs.same, runs.slower, strict=False)))),
    )
    _row("memory of unchanged code", [g.verdicts[0].status for g in gates(case, runs.same, "peak_allocated_bytes")])
    _row(
        f"memory, one more tensor of {GROWTH:.0%}",
        [check([case], [r], metrics=["peak_allocated_bytes"]).verdicts[0].status for r in runs.fatter],
    )


def _row(name: str, found: Sequence[str]) -> None:
    n = Counter(found)
    cells = "".join(
        f"{n[s]:>{w}}" for s, w in zip(("regressed", "improved", "inconclusive", "pass"), (11, 10, 10, 6), strict=True)
    )
    print(f"{name:<44}{len(found):>6}{cells}")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench_gate.py --real", description="The gate's rates on real runs.")
    parser.add_argument("--budget-s", type=float, default=600.0, help="about how long to measure (default 600)")
    parser.add_argument("--gates", type=int, default=20, help="gates of unchanged and of slowed code (default 20)")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="keep the runs here; measured before: read them")
    args = parser.parse_args(arguments)
    if args.runs is not None and args.runs.exists():
        data = json.loads(args.runs.read_text(encoding="utf-8"))
        tell(Runs(**{name: [StepReport.from_dict(d) for d in reports] for name, reports in data.items()}))
        return
    started, load = time.monotonic(), os.getloadavg()
    runs = measure_all(args.budget_s, args.gates)
    if args.runs is not None:
        args.runs.write_text(json.dumps({name: [r.to_dict() for r in reports] for name, reports in vars(runs).items()}))
    print(
        f"measured for {time.monotonic() - started:.0f} s; load of the machine {load[0]:.1f} before, {os.getloadavg()[0]:.1f} after\n"
    )
    tell(runs)


if __name__ == "__main__":
    main(sys.argv[1:])
