"""``zerocast accuracy``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from estimator.errors import InputError
from zerocast.failed import Failed
from zerocast.job_flags import json_flag

if TYPE_CHECKING:
    from validator.published import Evaluation

RECORDS = Path("validator/records")
"""Of a source tree."""


@click.command(
    "accuracy",
    short_help="Hold forecasts against training runs that others published.",
    epilog="Example: zerocast accuracy --runs published_runs.csv --budget llm-foundry/step_time_s:median=5",
)
@click.option(
    "--runs", type=click.Path(path_type=Path), metavar="FILE",
    help="CSV with one published run per row: shape, machine, strategy, and what was measured. Default: the project's own.",
)  # fmt: skip
@click.option(
    "--budget", "budgets", metavar="BUDGET", multiple=True,
    help="Exit with 1 when errors are larger: [SOURCE/]METRIC:STATISTIC=PERCENT, for every source whose name has that word; "
    "metrics step_time_s, peak_mem_bytes, fits; statistics median, p90, bias, coverage (at least).",
)  # fmt: skip
@click.option(
    "--write", "page", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write the accuracy page (Markdown) about the project's records and published runs.",
)  # fmt: skip
@click.option(
    "--records", type=click.Path(path_type=Path), metavar="DIR", default=RECORDS, show_default=True,
    help="With --write: the records.",
)  # fmt: skip
@json_flag
def command(runs: Path | None, budgets: tuple[str, ...], page: Path | None, records: Path, as_json: bool) -> None:
    """Forecast every published run with the shipped constants and say how far off the forecasts are.

    Errors are forecast / published - 1, by source and GPU. A run that cannot be expressed is counted as skipped, with
    its reason. How well constants do without the runs that they are forecast for is on the page that --write writes.
    """
    from validator.published import broken_budgets, evaluate, parse_published_budgets, read_runs
    from validator.published.cases import TABLE
    from zerocast.show import progress, write_json

    promised = parse_published_budgets(budgets)
    if page is not None and runs is not None:
        raise InputError(
            f"--write {page} takes no --runs: the page is about the project's own records and published runs"
        )
    table = read_runs(runs or TABLE)
    with progress() as bar:
        task = bar.add_task("forecasting", total=len(table))
        result = evaluate(table, lambda: bar.advance(task))
    if page is not None:
        _write_page(page, records, result)
    if as_json:
        write_json({"groups": [g._asdict() for g in result.groups], "rows": [r._asdict() for r in result.rows]})
    else:
        _show(result)
    failures = broken_budgets(result.groups, promised)
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise Failed(f"{failures[0]}{more}")


def _write_page(page: Path, records: Path, result: Evaluation) -> None:
    from validator.compare import compare_sources
    from validator.published import read_runs
    from validator.published.cases import TABLE
    from validator.store.files import read_record_files
    from zerocast.accuracy import accuracy_page
    from zerocast.published_page import published_page, write_plot

    files, _ = read_record_files(records)
    compared = compare_sources([(file.reports, [file.profile] if file.profile else []) for file in files])
    runs = read_runs(TABLE)
    sections = published_page(runs, result)
    text = accuracy_page(files, compared, f"zerocast accuracy --write {page}", sections)
    write_plot(page.parent, runs)
    page.write_text(text, encoding="utf-8")


def _show(result: Evaluation) -> None:
    from zerocast.published_page import error_rows
    from zerocast.show import say, show_rows

    show_rows("Forecast against published runs", error_rows(result), left=("source", "GPU", "metric"))
    for reason, n in Counter(row.skipped for row in result.rows if row.skipped is not None).most_common():
        say(f"skipped {n}: {reason}")
