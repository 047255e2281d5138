"""Errors of this estimator and of others on the same published runs, by source.

``PYTHONPATH=. python benchmarks/bench_estimators.py --runs RUNS.csv`` prints the tables of ``docs/estimators.md``: memory of a GPU by the formulas of
``other_estimators.py``, seconds of a step by the rule 6ND + 12Lds^2. Any file in the columns of the published runs will do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
import other_estimators as others

from estimator.errors import InputError
from estimator.job import Job
from estimator.time.stack import shipped_stacks
from estimator.units import GIB
from validator.published import PublishedRun, evaluate, read_runs
from validator.published.cases import TABLE
from validator.published.expression import job_of

MEMORY: dict[str, Callable[[Job, PublishedRun], float | None]] = {
    "DeepSpeed": lambda job, run: others.deepspeed(job),
    "Accelerate": lambda job, run: others.accelerate(job, run.text("param_dtype") or job.strategy.dtype),
    "Megatron-LM": lambda job, run: others.megatron(job),
    "EleutherAI": lambda job, run: others.eleuther(job),
    "llm-analysis": lambda job, run: others.llm_analysis(job),
}
OURS, LEFT_OUT, RULE = "zerocast", "zerocast, model left out", "6ND rule, model left out"


class Error(NamedTuple):
    source: str
    metric: str
    estimator: str
    percent: float
    """Forecast over published, minus 100."""


def errors_of(runs: Sequence[PublishedRun]) -> list[Error]:
    """Every estimator's errors on those of ``runs`` that this one can forecast."""
    found: list[Error] = []
    timed: list[tuple[PublishedRun, Job, float]] = []
    left_out = {run: e for (_, _, by), own in shipped_stacks().errors.items() if by == "model" for run, e in own.items()}
    for run, row in zip(runs, evaluate(runs).rows, strict=True):
        try:
            job = job_of(run)
        except InputError:
            continue
        source = run.text("source") or ""
        gib, seconds = run.number("peak_mem_gib"), run.number("step_time_s")
        if gib and row.peak_mem_bytes is not None:
            said = {OURS: float(row.peak_mem_bytes)} | {name: tool(job, run) for name, tool in MEMORY.items()}
            found += [Error(source, "memory", n, 100 * (b / (gib * GIB) - 1)) for n, b in said.items() if b is not None]
        if seconds and row.step_time_s is not None:
            found.append(Error(source, "step time", OURS, 100 * (row.step_time_s / seconds - 1)))
            if run.run_id in left_out:
                found.append(Error(source, "step time", LEFT_OUT, 100 * (exp(left_out[run.run_id]) - 1)))
            timed.append((run, job, seconds))
    return found + _rule_errors(timed)


def _rule_errors(timed: Sequence[tuple[PublishedRun, Job, float]]) -> list[Error]:
    """The rule's constant for a run is the median of what other models reached on its GPU in its dtype; where no other model did, of
    what all other models reached on any."""
    reached: list[tuple[PublishedRun, tuple[str, str], float]] = []
    for run, job, seconds in timed:
        at_peak = others.rule_seconds(job, 1.0)
        if at_peak is not None:
            kind = job.cluster.gpu.name, "fp8" if job.strategy.matmul_dtype == "fp8" else job.strategy.dtype
            reached.append((run, kind, at_peak / seconds))
    found = []
    for run, kind, share in reached:
        rest = [(k, x) for other, k, x in reached if other.text("model") != run.text("model")]
        near = [x for k, x in rest if k == kind] or [x for _, x in rest]
        if near:
            found.append(Error(run.text("source") or "", "step time", RULE, 100 * (share / statistics.median(near) - 1)))
    return found


def rows_of(errors: Sequence[Error], metric: str) -> list[str]:
    """Lines of a Markdown table: by source, then over all."""
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for error in errors:
        if error.metric == metric:
            groups[error.source][error.estimator].append(error.percent)
            groups["all"][error.estimator].append(error.percent)
    lines = ["| source | estimator | runs | median | P90 | bias |", "|---|---|---|---|---|---|"]
    for source in sorted(groups, key=lambda s: (s == "all", s)):
        for name, own in groups[source].items():
            sizes = sorted(map(abs, own))
            p90 = sizes[-1] if len(sizes) < 2 else statistics.quantiles(sizes, n=10, method="inclusive")[-1]
            lines.append(
                f"| {source} | {name} | {len(own)} | {statistics.median(sizes):.1f}% | {p90:.1f}% | {statistics.fmean(own):+.1f}% |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=TABLE, help="a CSV of published runs (default: those of the project)")
    try:
        errors = errors_of(read_runs(parser.parse_args().runs))
    except InputError as error:
        raise SystemExit(str(error)) from None
    for metric in ("memory", "step time"):
        print(f"{metric}: size of errors (median, P90) and their mean\n")
        print("\n".join(rows_of(errors, metric)) + "\n")


if __name__ == "__main__":
    main()
