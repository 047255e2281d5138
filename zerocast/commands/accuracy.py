"""``zerocast accuracy``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zerocast.job_flags import json_flag

if TYPE_CHECKING:
    from validator.published import Evaluation


@click.command(
    "accuracy",
    short_help="Hold forecasts against training runs that others published.",
    epilog="Example: zerocast accuracy --runs published_runs.csv --json",
)
@click.option(
    "--runs", type=click.Path(path_type=Path), metavar="FILE", required=True,
    help="CSV with one published run per row: shape, machine, strategy, and what was measured.",
)  # fmt: skip
@json_flag
def command(runs: Path, as_json: bool) -> None:
    """Forecast every run with the shipped constants, fitted to none of them, and say how far off the forecasts are.

    Errors are forecast / published - 1, by source and GPU. A run that cannot be expressed is counted as skipped, with
    its reason.
    """
    from validator.published import evaluate, read_runs
    from zerocast.show import progress, write_json

    table = read_runs(runs)
    with progress() as bar:
        task = bar.add_task("forecasting", total=len(table))
        result = evaluate(table, lambda: bar.advance(task))
    if as_json:
        write_json({"groups": [g._asdict() for g in result.groups], "rows": [r._asdict() for r in result.rows]})
    else:
        _show(result)


def _show(result: Evaluation) -> None:
    from zerocast.show import say, show_rows

    rows = [
        {
            "source": g.source,
            "GPU": g.gpu,
            "metric": g.metric,
            "runs": g.n,
            "skipped": g.skipped,
            **{
                name: "" if value is None else f"{value:.1f} %"
                for name, value in (
                    ("median", g.median_abs_pct),
                    ("P90", g.p90_abs_pct),
                    ("bias", g.bias_pct),
                    ("in interval", g.coverage90_pct),
                )
            },
        }
        for g in result.groups
    ]
    show_rows("Forecast against published runs", rows, left=("source", "GPU", "metric"))
    for reason, n in Counter(row.skipped for row in result.rows if row.skipped is not None).most_common():
        say(f"skipped {n}: {reason}")
