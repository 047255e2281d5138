"""``zerocast check``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from estimator.errors import InputError, invalid, unknown_choice
from zerocast.failed import Failed
from zerocast.job_flags import json_flag, load_profile, profile_flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.report import StepReport
    from validator.baseline import Baseline, BaselineCase, EnvironmentBaseline
    from validator.gate import Gate

RUNS = 5
"""Runs of each case when the gate measures."""


@click.command(
    "check",
    short_help="Hold new runs against a baseline; fail when a metric regressed.",
    epilog="Example: zerocast check --baseline baseline.json --junit check.xml",
)
@click.option(
    "--baseline", "path", type=click.Path(path_type=Path), metavar="FILE", required=True, help="The baseline."
)
@click.option("--update", is_flag=True, help="Write the records into the baseline (made when missing); decide nothing.")
@click.option("--measure", is_flag=True, help="With --update: measure the baseline's cases on this machine first.")
@click.option("--records", type=click.Path(path_type=Path), metavar="FILE", help="Records file to read.")
@click.option("--store", "store_path", type=click.Path(path_type=Path), metavar="FILE", help="Record store to read.")
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Runs of each case to measure (default {RUNS}), or newest records to take (default all).",
)
@click.option(
    "--metric",
    "metrics",
    metavar="NAME",
    multiple=True,
    help="Metric to decide; repeat for several. Default: all that are known.",
)
@click.option(
    "--min-effect",
    default="3%",
    show_default=True,
    metavar="PERCENT",
    help="Slow-downs below this pass. Memory is always exact.",
)
@click.option(
    "--any-host", is_flag=True, help="Take a baseline from another host name (same GPU, CPU, torch, CUDA and driver)."
)
@click.option("--strict", is_flag=True, help="Exit with 1 when something is inconclusive, too.")
@click.option("--junit", type=click.Path(path_type=Path), metavar="FILE", help="Write JUnit XML.")
@click.option(
    "--summary", type=click.Path(path_type=Path), metavar="FILE", help="Append Markdown, e.g. to $GITHUB_STEP_SUMMARY."
)
@profile_flag
@json_flag
def command(
    path: Path, update: bool, measure: bool, records: Path | None, store_path: Path | None, runs: int | None, metrics: tuple[str, ...],
    min_effect: str, any_host: bool, strict: bool, junit: Path | None, summary: Path | None, profile_path: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Decide for every case and metric of the baseline: pass, regressed, improved or inconclusive (needs n more runs).

    With --records or --store the gate reads recorded runs; with neither it measures the baseline's own cases again on this
    machine, in turn, and adds the runs to the default store. Exit codes: 0 nothing regressed, 1 something did, 2 bad input.
    """
    from validator.gate import METRICS, check

    least = _share(min_effect)
    for metric in metrics:
        if metric not in METRICS:
            raise unknown_choice("--metric", metric, METRICS)
    if records is not None and store_path is not None:
        raise InputError("--records and --store are both given; allowed: one of them")
    if measure and (not update or records is not None or store_path is not None):
        raise InputError("--measure is given; allowed: with --update, without --records and --store")
    if update:
        if metrics or junit is not None or summary is not None or strict or any_host:
            raise InputError(
                "--update decides nothing; allowed with it: --records, --store, --measure, --runs, --profile"
            )
        _update(path, measure, records, store_path, profile_path, runs, as_json)
        return
    place, reports, notes = _reports(path, records, store_path, runs, any_host)
    forecasts = {}
    if not metrics or any(m.endswith("_prediction_error") for m in metrics):
        jobs = {case.job_key for case in place.cases}
        forecasts = _forecasts([r for r in reports if r.job_key in jobs], profile_path, store_path)
    chosen = metrics or METRICS
    gate = check(
        place.cases, reports, min_effect=least, metrics=chosen, forecasts=forecasts, newest=runs if records or store_path else None
    )  # fmt: skip
    if not gate.verdicts:
        raise InputError(
            f"baseline {str(path)!r} knows none of the metrics {', '.join(chosen)} here; allowed: at least one"
        )
    if not any(v.n_now or v.status == "regressed" for v in gate.verdicts):
        raise InputError(f"there is no new run of any case of baseline {str(path)!r}; allowed: at least one")
    notes += [f"not in the baseline: {name}" for name in gate.unknown_cases]
    _tell(gate, place, notes, junit, summary, strict, as_json)
    wrong = gate.regressed or (gate.inconclusive if strict else ())
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise Failed(f"{wrong[0].case}: {wrong[0].metric} {wrong[0].status}, {wrong[0].reason}{more}")


def _share(text: str) -> float:
    """``3%`` as 0.03."""
    number = text.strip()
    try:
        share = float(number.removesuffix("%")) / 100 if number.endswith("%") else -1.0
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise invalid("--min-effect", text, "a percentage above 0% and below 100%, such as 3%")
    return share


def _read(records: Path | None, store_path: Path | None) -> list[StepReport]:
    from validator.records import import_reports
    from validator.store import Store

    reports = import_reports(records) if records is not None else Store(store_path).reports()
    measured = [r for r in reports if r.origin != "predicted"]
    if not measured:
        raise InputError(f"{records or Store(store_path).path} holds no measured runs; allowed: at least one")
    return measured


def _update(
    path: Path, measure: bool, records: Path | None, store_path: Path | None, profile_path: Path | None, runs: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    from validator.baseline import Baseline, load_baseline, save_baseline, update
    from zerocast.show import say, write_json

    old = load_baseline(path) if path.exists() or measure else Baseline()
    if measure:
        cases = {case.identity: case for place in old.environments for case in place.cases}
        reports = _measured(list(cases.values()), runs or RUNS)
    else:
        reports = _read(records, store_path)
    new = update(old, reports, _forecasts(reports, profile_path, store_path), runs)
    save_baseline(new, path)
    n_cases, n_runs = (
        sum(len(e.cases) for e in new.environments),
        sum(len(c.runs) for e in new.environments for c in e.cases),
    )
    if as_json:
        write_json({"baseline": str(path), "environments": len(new.environments), "cases": n_cases, "runs": n_runs})
        return
    say(f"{path}: {len(new.environments)} environment(s), {n_cases} case(s), {n_runs} run(s)")
    short = [c.name for e in new.environments for c in e.cases if c.origin != "fake" and len(c.runs) < RUNS]
    if short:
        say(f"warning: fewer than {RUNS} runs, too few to decide on time: {'; '.join(short)}")


def _forecasts(reports: list[StepReport], profile_path: Path | None, store_path: Path | None) -> dict[str, StepReport]:
    """Today's forecasts by job key; a job that cannot be forecast has no prediction error."""
    from dashboard.predictions import compare_records
    from dashboard.profiles import profiles_beside

    profile = load_profile(profile_path)
    return compare_records(reports, [profile] if profile else profiles_beside(store_path)).predicted


def _reports(
    path: Path, records: Path | None, store_path: Path | None, runs: int | None, any_host: bool
) -> tuple[EnvironmentBaseline, list[StepReport], list[str]]:
    """The baseline's part for the environment of the records (or of this machine), the runs to judge, and notes."""
    from validator.baseline import environment_of, load_baseline
    from validator.remeasure import local_environment

    baseline = load_baseline(path)
    if records is None and store_path is None:
        place = _place(baseline, local_environment(), path, any_host)
        return place, _measured(place.cases, runs or RUNS), []
    reports = _read(records, store_path)
    by_place: dict[tuple[str | None, ...], list[StepReport]] = {}
    for report in reports:
        by_place.setdefault(tuple(environment_of(report.provenance).values()), []).append(report)
    known: list[tuple[EnvironmentBaseline, list[StepReport]]] = []
    refused: list[InputError] = []
    for group in by_place.values():
        try:
            known.append((_place(baseline, environment_of(group[0].provenance), path, any_host), group))
        except InputError as error:
            refused.append(error)
    if not known:
        raise refused[-1]
    if len({id(place) for place, _ in known}) > 1:
        raise InputError(f"{records or store_path} holds runs of several environments of the baseline; allowed: of one")
    taken = {id(report) for _, group in known for report in group}
    kept = [report for report in reports if id(report) in taken]  # oldest first, as they came
    left = len(reports) - len(kept)
    return known[0][0], kept, [f"{left} record(s) left out, {refused[0]}"] if left else []


def _place(baseline: Baseline, environment: dict[str, str | None], path: Path, any_host: bool) -> EnvironmentBaseline:
    found = baseline.find(environment)
    if found is None and any_host:
        found = next((p for e in baseline.environments if (p := baseline.find({**environment, "host": e.environment["host"]}))), None)  # fmt: skip
    if found is None:
        raise baseline.refusal(environment, path)
    return found


def _measured(cases: Sequence[BaselineCase], n_runs: int) -> list[StepReport]:
    """New runs of every case, each recorded in the default store as soon as it is there."""
    from validator.remeasure import remeasure
    from validator.runner import MeasureError
    from validator.store import Store
    from zerocast.show import progress

    store, reports = Store(), []
    n_fake = sum(c.origin == "fake" for c in cases)
    with progress() as bar:
        task = bar.add_task("measuring", total=n_fake + n_runs * (len(cases) - n_fake))
        try:
            for report in remeasure(cases, n_runs):
                store.add(report)
                reports.append(report)
                bar.update(task, advance=1)
        except MeasureError as error:
            raise Failed(str(error)) from None
    return reports


def _tell(
    gate: Gate, place: EnvironmentBaseline, notes: list[str], junit: Path | None, summary: Path | None, strict: bool, as_json: bool
) -> None:  # fmt: skip
    from validator import gate_report
    from zerocast.show import say, table, write_json

    if junit is not None:
        gate_report.write(junit, gate_report.junit(gate, place.environment, strict))
    if summary is not None:
        gate_report.write(summary, gate_report.markdown(gate, place.environment), append=True)
    if os.environ.get("GITHUB_ACTIONS"):  # on standard error, so that --json stays JSON
        for line in gate_report.github_lines(gate, strict):
            click.echo(line, err=True)
    if as_json:
        data: dict[str, Any] = {**gate.to_dict(), "environment": place.environment, "notes": notes}
        write_json({**data, "regressed": len(gate.regressed), "inconclusive": len(gate.inconclusive)})
        return
    columns = [("case", "left"), ("metric", "left"), ("baseline", "right"), ("now", "right"), ("change", "right"), ("runs", "right"), ("verdict", "left")]  # fmt: skip
    rows = [
        (
            v.case, v.metric.replace("_", " "), gate_report.value_text(v.metric, v.baseline), gate_report.value_text(v.metric, v.now),
            gate_report.change_text(v), f"{v.n_baseline} / {v.n_now}", v.status,
        )
        for v in gate.verdicts
    ]  # fmt: skip
    table("Against the baseline (runs: baseline / now)", columns, rows)
    for v in gate.inconclusive:
        say(f"warning: {v.case}, {v.metric}: {v.reason}")
    for note in notes:
        say(f"note: {note}")
    say(gate_report.headline(gate))
