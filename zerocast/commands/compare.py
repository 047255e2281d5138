"""``zerocast compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from estimator.errors import InputError, unknown_choice
from zerocast.failed import Failed
from zerocast.job_flags import json_flag, load_profile, profile_flag, store_flag

if TYPE_CHECKING:
    from dashboard.predictions import Compared
    from estimator.report import StepReport
    from validator.compare import Row

GATED = ("peak_allocated_bytes", "step_s")
"""Terms that --fail-over looks at when none is named."""


@click.command(
    "compare",
    short_help="Hold recorded runs against their forecasts; fail when they drift.",
    epilog="Example: zerocast compare --records validator/records/h200.jsonl --term peak_allocated_bytes --fail-over 5",
)
@click.option("--records", type=click.Path(path_type=Path), metavar="FILE", help="Records file instead of the store.")
@click.option("--model", metavar="NAME", help="Only records of this model.")
@click.option("--origin", metavar="NAME", help="Only records of this origin: fake, cpu, cuda, cuda-virtual.")
@click.option("--term", "terms", metavar="NAME", multiple=True, help="Terms to show and to gate; repeat for several.")
@click.option(
    "--fail-over", type=click.FloatRange(min=0), metavar="PERCENT", help="Exit with 1 when an error is larger."
)
@click.option("--worst", type=click.IntRange(min=1), default=10, show_default=True, help="Worst cases to list.")
@store_flag
@profile_flag
@json_flag
def command(
    records: Path | None, model: str | None, origin: str | None, terms: tuple[str, ...], fail_over: float | None,
    worst: int, store_path: Path | None, profile_path: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Forecast every recorded run again and compare, term by term.

    Runs of a calibrated machine use the profile beside the store, or --profile. --fail-over looks at peak memory and step
    time (or the terms named with --term); bytes on the wire must always be equal.
    """
    from dashboard.predictions import compare_records
    from dashboard.profiles import profiles_beside
    from zerocast.show import write_json

    measured = _measured(records, store_path, model, origin)
    profile = load_profile(profile_path)
    result = compare_records(measured, [profile] if profile else profiles_beside(store_path))
    known = {row.term for row in result.comparison.rows}
    for term in terms:
        if term not in known:
            raise unknown_choice("--term", term, known)
    failures = _failures(result, terms or GATED, fail_over)
    if as_json:
        write_json({**result.comparison.to_dict(), "refused": result.refused, "failures": failures})
    else:
        _show(result, terms, worst, len(measured))
    if failures and fail_over is not None:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise Failed(f"{failures[0]}{more}")


def _measured(records: Path | None, store_path: Path | None, model: str | None, origin: str | None) -> list[StepReport]:
    """Measured reports of a file or the store. Raises ``InputError`` when there are none."""
    from validator.records import import_reports
    from validator.store import Store

    if records is not None and store_path is not None:
        raise InputError("--records and --store are both given; allowed: one of them")
    place = str(records or Store(store_path).path)
    reports = import_reports(records) if records is not None else Store(store_path).reports()
    chosen = [
        r
        for r in reports
        if r.origin != "predicted"
        and origin in (None, r.origin)
        and model in (None, (r.job.get("model") or {}).get("name"))
    ]
    if not chosen:
        raise InputError(f"{place} has no such measured runs; allowed: at least one ('zerocast measure' adds them)")
    return chosen


def _failures(result: Compared, terms: tuple[str, ...], fail_over: float | None) -> list[str]:
    """One sentence per broken promise, the largest error first."""
    if fail_over is None:
        return []
    wrong = [
        f"{row.case}: {row.term} must be equal, predicted {row.predicted:g}, measured {row.measured:g}"
        for row in result.comparison.inexact
    ]
    gated = sorted((r for r in result.comparison.rows if r.term in terms), key=lambda r: -_size(r))
    wrong += [
        f"{row.case}: {row.term} predicted {row.predicted:.6g}, measured {row.measured:.6g}, "
        f"error {'undefined' if row.error is None else f'{row.error:+.1%}'} is over {fail_over:g} %"
        for row in gated
        if _size(row) * 100 > fail_over
    ]
    if not gated:
        wrong.append(f"nothing to gate: no run has both a forecast and a measurement of {' or '.join(terms)}")
    return [*wrong, *(f"no forecast for job {key}: {reason}" for key, reason in result.refused.items())]


def _size(row: Row) -> float:
    return float("inf") if row.error is None else abs(row.error)


def _show(result: Compared, terms: tuple[str, ...], worst: int, n_measured: int) -> None:
    from dashboard.data import blame_table, compared_rows, term_label, term_place
    from zerocast.show import percent_cell, say, table

    c = result.comparison
    say(f"{n_measured} measured runs, {len(result.predicted)} jobs forecast\n")
    moved = {row["term"] for row in compared_rows(c.rows)}
    summaries = sorted((s for s in c.summaries if s.term in (terms or moved)), key=lambda s: term_place(s.term))
    columns = [
        ("term", "left"),
        ("n", "right"),
        ("median error", "right"),
        ("P90", "right"),
        ("worst", "right"),
        ("bias", "right"),
    ]
    cells = [
        (
            term_label(s.term),
            str(s.n),
            percent_cell(s.median),
            percent_cell(s.p90),
            percent_cell(s.worst),
            percent_cell(s.bias),
        )
        for s in summaries
    ]
    table("Error of each term (predicted against measured)", columns, cells)
    worst_rows = blame_table(c.blames[:worst])
    if worst_rows:
        heads = [(name, "right" if name in ("error", "by") else "left") for name in worst_rows[0]]
        table("Worst first", heads, [list(row.values()) for row in worst_rows])
    for origin, correlation in c.step_rank_correlation.items():
        if correlation is not None:
            say(f"{origin}: rank correlation of step times {correlation:.3f}")
    say(f"bytes on the wire: {'all equal' if not c.inexact else f'{len(c.inexact)} differ'}")
    for key, reason in result.refused.items():
        say(f"no forecast for job {key}: {reason}")
