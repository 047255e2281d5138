"""Published runs as cases for the fit of constants, and what comes of it: the file ``estimator/catalog/stacks.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from estimator.errors import InputError
from estimator.time.stack import Shipped, Stack
from validator.published.expression import job_of
from validator.published.fit import Case, ChipFits, fit_chips
from validator.published.left_out import GROUPS, residuals
from validator.published.runs import PublishedRun

TABLE = Path(__file__).resolve().parent / "runs.csv"
"""The runs that come with the project."""

FEWEST = 10
"""Of fewer runs of a framework no constants are made."""


def cases_of(runs: Sequence[PublishedRun]) -> list[Case]:
    """Those of ``runs`` that published a step time and can be forecast."""
    cases = []
    alike: dict[str, dict[Stack, float]] = {}
    for run in runs:
        seconds = run.number("step_time_s")
        if not seconds:
            continue
        try:
            job = job_of(run)
        except InputError:
            continue
        cases.append(
            Case(
                run.run_id, run.text("source") or "", job.strategy.framework, job.cluster.gpu.name, run.text("model") or "",
                job.cluster.n_gpus, seconds, job, alike.setdefault(job.key, {}),
            )
        )  # fmt: skip
    return cases


def fit_stacks(cases: Sequence[Case], on_step: Callable[[str], None] = lambda what: None) -> Shipped:
    """Constants of every framework and GPU among ``cases``, and errors of runs forecast without their groups.

    ``on_step`` is told what begins.
    """
    by_framework = {f: [case for case in cases if case.framework == f] for f in sorted({c.framework for c in cases})}
    fits: dict[str, ChipFits] = {}
    for framework, own in by_framework.items():
        if len(own) < FEWEST:
            continue
        on_step(f"fit {framework}: {len(own)} runs")
        fits[framework] = fit_chips(own)
    stacks = {(f, "*"): fit.together for f, fit in fits.items()}
    stacks |= {
        (case.framework, case.gpu): fits[case.framework].by_chip[case.chip] for case in cases if case.framework in fits
    }
    errors: dict[tuple[str, str, str], dict[str, float]] = {}
    for by in GROUPS:
        on_step(f"leave out one {by} at a time")
        for case, _, log_error in residuals(by_framework, fits, by):
            errors.setdefault((case.framework, case.gpu, by), {})[case.run_id] = log_error
    return Shipped(stacks, errors, f"{datetime.now(UTC):%Y-%m-%d}")
