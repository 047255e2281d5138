"""``zerocast check``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from estimator.errors import InputError, invalid, unknown_choice
from zerocast.failed import Failed
from zerocast.job_flags import json_flag, load_profile, profile_flag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.report import StepReport
    from validator.gate.baseline import Baseline, BaselineCase, Environment, EnvironmentBaseline, Report
    from validator.gate.decide import Gate, Verdict

RUNS = 5
"""Runs of each case when the gate measures."""
PAIRS = 8
"""Pairs of runs of each case with --against."""
MOST_UNKNOWN = 5
"""Cases outside the baseline that are named."""


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
@click.option(
    "--against",
    metavar="REV",
    help="Measure this git revision of Zerocast's own tree, too, in turn with the code as it is; decide on the pairs.",
)
@click.option(
    "--case", "wanted", metavar="TEXT", multiple=True, help="Only cases whose name has TEXT in it; repeat for several."
)
@click.option("--records", type=click.Path(path_type=Path), metavar="FILE", help="Records file to read.")
@click.option("--store", "store_path", type=click.Path(path_type=Path), metavar="FILE", help="Record store to read.")
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Runs of each case to measure (default {RUNS}; --against: {PAIRS} pairs), or newest records to take (default all).",
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
    path: Path, update: bool, measure: bool, against: str | None, wanted: tuple[str, ...], records: Path | None,
    store_path: Path | None, runs: int | None, metrics: tuple[str, ...], min_effect: str, any_host: bool, strict: bool,
    junit: Path | None, summary: Path | None, profile_path: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Decide for every case and metric of the baseline: pass, regressed, improved or inconclusive (needs n more runs).

    With --records or --store the gate reads recorded runs; with neither it measures the baseline's own cases again on this
    machine, in turn, and adds the runs to the default store. With --against it takes only the cases from the baseline, and
    measures both versions here. Exit codes: 0 nothing regressed, 1 something did, 2 bad input.
    """
    from validator.gate.decide import METRICS

    least = _share(min_effect)
    for metric in metrics:
        if metric not in METRICS:
            raise unknown_choice("--metric", metric, METRICS)
    if records is not None and store_path is not None:
        raise InputError("--records and --store are both given; allowed: one of them")
    if measure and (not update or records is not None or store_path is not None):
        raise InputError("--measure is given; allowed: with --update, without --records and --store")
    if against is not None and (update or any_host or records or store_path or profile_path):
        raise InputError(
            "--against measures both sides; allowed with it: --case, --runs, --metric, --min-effect and outputs"
        )
    if update:
        if metrics or junit is not None or summary is not None or strict or any_host or wanted:
            raise InputError(
                "--update decides nothing; allowed with it: --records, --store, --measure, --runs, --profile"
            )
        _update(path, measure, records, store_path, profile_path, runs, as_json)
        return
    if against is not None:
        gate, environment, notes = _against(path, against, wanted, runs or PAIRS, metrics, least)
    else:
        gate, environment, notes = _judged(
            path, records, store_path, runs, metrics, least, any_host, profile_path, wanted
        )
    _tell(gate, environment, notes, junit, summary, strict, as_json)
    wrong = gate.regressed or (gate.inconclusive if strict else ())
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise Failed(f"{wrong[0].case}: {wrong[0].metric} {wrong[0].status}, {wrong[0].reason}{more}")


def _judged(
    path: Path, records: Path | None, store_path: Path | None, runs: int | None, metrics: tuple[str, ...], least: float,
    any_host: bool, profile_path: Path | None, wanted: tuple[str, ...],
) -> tuple[Gate, Environment, list[str]]:  # fmt: skip
    """New runs, read or measured, against the baseline's."""
    from estimator.report import StepReport
    from validator.gate.decide import METRICS, check

    place, reports, notes = _reports(path, records, store_path, runs, any_host, wanted)
    forecasts = {}
    if not metrics or any(m.endswith("_prediction_error") for m in metrics):
        jobs = {case.job_key for case in place.cases}
        steps = [r for r in reports if isinstance(r, StepReport) and r.job_key in jobs]
        forecasts = _forecasts(steps, profile_path, store_path) if steps else {}
    chosen = metrics or METRICS
    gate = check(
        place.cases, reports, min_effect=least, metrics=chosen, forecasts=forecasts, newest=runs if records or store_path else None
    )  # fmt: skip
    _require_verdicts(gate.verdicts, chosen, path)
    if not any(v.n_now or v.status == "regressed" for v in gate.verdicts):
        raise InputError(f"there is no new run of any case of baseline {str(path)!r}; allowed: at least one")
    unknown = [] if wanted else [f"not in the baseline: {name}" for name in gate.unknown_cases]
    if len(unknown) > MOST_UNKNOWN:
        unknown[MOST_UNKNOWN:] = [f"and {len(unknown) - MOST_UNKNOWN} more cases that are not in the baseline"]
    return gate, place.environment, notes + unknown


def _against(
    path: Path, revision: str, wanted: tuple[str, ...], n_pairs: int, metrics: tuple[str, ...], least: float
) -> tuple[Gate, Environment, list[str]]:
    """The code as it is against ``revision``, on the cases of the baseline, in pairs of runs."""
    from validator.gate.against import measure_pairs, unpacked, working_tree
    from validator.gate.baseline import Baseline, environment_of, load_baseline, run_of, update
    from validator.gate.decide import METRICS, Gate, check_runs
    from validator.measure.runner import MeasureError
    from validator.store.database import Store
    from zerocast.show import progress

    known = {case.identity: case for place in load_baseline(path).environments for case in place.cases}
    cases = [case for case in _chosen(list(known.values()), wanted, path) if case.kind == "step"]
    if not cases:
        raise InputError(f"baseline {str(path)!r} has no case of a training step; allowed with --against: at least one")
    store = Store()
    verdicts: list[Verdict] = []
    environment: Environment = {}
    with progress() as bar, unpacked(revision) as old:
        new = working_tree()
        task = bar.add_task("measuring", total=sum(1 if c.origin == "fake" else n_pairs for c in cases))
        for case in cases:
            pairs: list[tuple[StepReport, StepReport]] = []
            try:
                for pair in measure_pairs(case, old, new, n_pairs):
                    store.add_many(pair)
                    pairs.append(pair)
                    bar.update(task, advance=1)
            except MeasureError as error:
                raise Failed(str(error)) from None
            environment = environment_of(pairs[0][1].provenance)
            (place,) = update(Baseline(), [a for a, _ in pairs], {}).environments
            verdicts += check_runs(
                place.cases[0], [run_of(b) for _, b in pairs], min_effect=least, metrics=metrics or METRICS, paired=True
            )
    _require_verdicts(tuple(verdicts), metrics or METRICS, path)
    commit = f"baseline: {revision}, {(old.commit or '')[:12]}"
    return Gate(verdicts=tuple(verdicts)), environment, [f"{commit}; now: the working tree, measured in turn"]


def _require_verdicts(verdicts: tuple[Verdict, ...], metrics: Sequence[str], path: Path) -> None:
    if not verdicts:
        raise InputError(
            f"baseline {str(path)!r} knows none of the metrics {', '.join(metrics)} here; allowed: at least one"
        )


def _chosen(cases: Sequence[BaselineCase], wanted: tuple[str, ...], path: Path) -> tuple[BaselineCase, ...]:
    """The cases that ``--case`` names."""
    found = tuple(case for case in cases if not wanted or any(text in case.name for text in wanted))
    if not found and wanted:
        raise unknown_choice("--case", wanted[0], [case.name for case in cases])
    return found


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


def _read(records: Path | None, store_path: Path | None) -> list[Report]:
    from estimator.report import StepReport
    from validator.gate.records import read_records, read_store
    from validator.store.database import Store

    reports = read_records(records) if records is not None else read_store(Store(store_path))
    measured: list[Report] = [r for r in reports if not isinstance(r, StepReport) or r.origin != "predicted"]
    if not measured:
        raise InputError(f"{records or Store(store_path).path} holds no measured runs; allowed: at least one")
    return measured


def _update(
    path: Path, measure: bool, records: Path | None, store_path: Path | None, profile_path: Path | None, runs: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    from estimator.report import StepReport
    from validator.gate.baseline import Baseline, load_baseline, save_baseline, update
    from zerocast.show import say, write_json

    old = load_baseline(path) if path.exists() or measure else Baseline()
    if measure:
        cases = {case.identity: case for place in old.environments for case in place.cases}
        reports = _measured(list(cases.values()), runs or RUNS)
    else:
        reports = _read(records, store_path)
    steps = [r for r in reports if isinstance(r, StepReport)]
    new = update(old, reports, _forecasts(steps, profile_path, store_path) if steps else {}, runs)
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
    from dashboard.profiles import profiles_beside
    from validator.compare import compare_records

    profile = load_profile(profile_path)
    return compare_records(reports, [profile] if profile else profiles_beside(store_path)).predicted


def _reports(
    path: Path, records: Path | None, store_path: Path | None, runs: int | None, any_host: bool, wanted: tuple[str, ...]
) -> tuple[EnvironmentBaseline, list[Report], list[str]]:
    """The baseline's part for the environment of the records (or of this machine), the runs to judge, and notes."""
    from validator.gate.baseline import environment_of, load_baseline
    from validator.gate.remeasure import local_environment

    baseline = load_baseline(path)
    if records is None and store_path is None:
        place = _only(_place(baseline, local_environment(), path, any_host), wanted, path)
        return place, _measured(place.cases, runs or RUNS), []
    reports = _read(records, store_path)
    by_place: dict[tuple[str | None, ...], list[Report]] = {}
    for report in reports:
        by_place.setdefault(tuple(environment_of(report.provenance).values()), []).append(report)
    known: list[tuple[EnvironmentBaseline, list[Report]]] = []
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
    place = _only(known[0][0], wanted, path)
    return place, kept, [f"{left} record(s) left out, {refused[0]}"] if left else []


def _only(place: EnvironmentBaseline, wanted: tuple[str, ...], path: Path) -> EnvironmentBaseline:
    return replace(place, cases=_chosen(place.cases, wanted, path))


def _place(baseline: Baseline, environment: dict[str, str | None], path: Path, any_host: bool) -> EnvironmentBaseline:
    found = baseline.find(environment)
    if found is None and any_host:
        found = next((p for e in baseline.environments if (p := baseline.find({**environment, "host": e.environment["host"]}))), None)  # fmt: skip
    if found is None:
        raise baseline.refusal(environment, path)
    return found


def _measured(cases: Sequence[BaselineCase], n_runs: int) -> list[Report]:
    """New runs of every case, each recorded in the default store as soon as it is there."""
    from estimator.report import StepReport
    from validator.gate.remeasure import remeasure
    from validator.kernels.report import KernelReport
    from validator.measure.runner import MeasureError
    from validator.store.database import Store
    from zerocast.show import progress

    store, reports = Store(), []
    cases = [case for case in cases if case.kind != "function"]
    if not cases:
        raise InputError("the baseline has only functions of tests, which pytest measures; allowed: steps or kernels")
    n_fake = sum(c.origin == "fake" for c in cases)
    with progress() as bar:
        task = bar.add_task("measuring", total=n_fake + n_runs * (len(cases) - n_fake))
        try:
            for report in remeasure(cases, n_runs):
                if isinstance(report, StepReport):
                    store.add(report)
                elif isinstance(report, KernelReport):
                    store.add_kernels([report])
                reports.append(report)
                bar.update(task, advance=1)
        except MeasureError as error:
            raise Failed(str(error)) from None
    return [*reports]


def _tell(
    gate: Gate, environment: Environment, notes: list[str], junit: Path | None, summary: Path | None, strict: bool, as_json: bool
) -> None:  # fmt: skip
    from validator.gate import report as gate_report
    from zerocast.show import say, table, write_json

    if junit is not None:
        gate_report.write(junit, gate_report.junit(gate, environment, strict))
    if summary is not None:
        gate_report.write(summary, gate_report.markdown(gate, environment), append=True)
    if os.environ.get("GITHUB_ACTIONS"):  # on standard error, so that --json stays JSON
        for line in gate_report.github_lines(gate, strict):
            click.echo(line, err=True)
    if as_json:
        data: dict[str, Any] = {**gate.to_dict(), "environment": dict(environment), "notes": notes}
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
    for text in gate_report.pace_lines(gate):
        say(f"note: {text}")
    for v in gate.inconclusive:
        say(f"warning: {v.case}, {v.metric}: {v.reason}")
    for note in notes:
        say(f"note: {note}")
    say(gate_report.headline(gate))
