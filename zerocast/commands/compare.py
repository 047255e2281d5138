"""``zerocast compare``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from estimator.errors import InputError, unknown_choice
from zerocast.failed import Failed
from zerocast.job_flags import json_flag, load_profile, profile_flag, store_flag

if TYPE_CHECKING:
    from validator.compare import Compared, GroupSummary
    from validator.store.files import RecordFile

GROUPS_SHOWN = ("backend", "stage")
"""Groupings that are shown when none is named with --by."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which runs, terms and groups are asked for."""

    model: str | None
    origin: str | None
    terms: tuple[str, ...]
    groupings: tuple[str, ...]
    worst: int


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where results go beside the terminal."""

    plots: Path | None
    page: Path | None
    as_json: bool


@click.command(
    "compare",
    short_help="Hold recorded runs against their forecasts; fail when they drift.",
    epilog="Example: zerocast compare --records validator/records --by offload --fail-over peak_allocated_bytes=2 "
    "--fail-over step_s:median=15",
)
@click.option(
    "--records", type=click.Path(path_type=Path), metavar="FILE|DIR",
    help="Records file, or folder of *.jsonl files, instead of the store.",
)  # fmt: skip
@click.option("--model", metavar="NAME", help="Only records of this model.")
@click.option("--origin", metavar="NAME", help="Only records of this origin: fake, cpu, cuda, cuda-virtual.")
@click.option("--term", "terms", metavar="NAME", multiple=True, help="Terms to show and to gate; repeat for several.")
@click.option(
    "--by", "groupings", metavar="NAME", multiple=True,
    help="Error table by backend, stage, offload, recompute, dtype, model, gpu or world; repeat for several.",
)  # fmt: skip
@click.option(
    "--fail-over", metavar="BUDGET", multiple=True,
    help="Exit with 1 when an error is larger: PERCENT, TERM=PERCENT or TERM:STATISTIC=PERCENT (worst, median, p90).",
)  # fmt: skip
@click.option("--worst", type=click.IntRange(min=1), default=10, show_default=True, help="Worst cases to list.")
@click.option(
    "--plots", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write scatter and residual PNGs."
)
@click.option(
    "--write", "page", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write the accuracy page (Markdown) about everything in --records.",
)  # fmt: skip
@store_flag
@profile_flag
@json_flag
def command(
    records: Path | None, fail_over: tuple[str, ...], store_path: Path | None, profile_path: Path | None, plots: Path | None,
    page: Path | None, as_json: bool, **wanted: Any,
) -> None:  # fmt: skip
    """Forecast every recorded run again and compare, term by term.

    Each records file uses the profile beside it (NAME.profile.json); the store uses the profiles beside it; --profile
    replaces both. A budget without a term holds for peak memory and step time, or the terms named with --term; bytes on
    the wire must always be equal.
    """
    from validator.compare import GATED, GROUPINGS, compare_sources, judge, parse_budgets

    want, out = Wanted(**wanted), Outputs(plots=plots, page=page, as_json=as_json)
    budgets = parse_budgets(fail_over)
    for by in want.groupings:
        if by not in GROUPINGS:
            raise unknown_choice("--by", by, GROUPINGS)
    if page is not None and (records is None or store_path is not None or want.model or want.origin):
        raise InputError(
            f"--write {page} needs --records and takes no --store, --model or --origin: the page is about whole files"
        )
    files, left_out = _files(records, store_path, want)
    given = load_profile(profile_path)
    result = compare_sources([(file.reports, _profiles(file, given, records, store_path)) for file in files])
    known = {row.term for row in result.comparison.rows}
    for term in want.terms:
        if term not in known:
            raise unknown_choice("--term", term, known)
    failures = (
        [overrun.sentence for overrun in judge(result.comparison, budgets, want.terms or GATED)] if budgets else []
    )
    if budgets:
        failures += [f"no forecast for job {key}: {reason}" for key, reason in result.refused.items()]
    said = _write_files(out, files, result, want, f"zerocast compare --records {records} --write {page}")
    if as_json:
        _write_json(result, want, left_out, failures, said)
    else:
        _show(result, want, sum(len(file.reports) for file in files), [*_left_out_lines(left_out), *said])
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise Failed(f"{failures[0]}{more}")


def _files(records: Path | None, store_path: Path | None, want: Wanted) -> tuple[list[RecordFile], list[Path]]:
    """The chosen reports of each file (or of the store), and files left out. Raises ``InputError`` without any."""
    from validator.store.database import Store
    from validator.store.files import RecordFile, read_record_files

    if records is not None and store_path is not None:
        raise InputError("--records and --store are both given; allowed: one of them")
    if records is not None:
        files, left_out = read_record_files(records)
    else:
        store = Store(store_path)
        measured = tuple(r for r in store.reports() if r.origin != "predicted")
        files, left_out = [RecordFile(path=store.path, reports=measured, profile=None)], []
    chosen = []
    for file in files:
        reports = tuple(
            r
            for r in file.reports
            if want.origin in (None, r.origin) and want.model in (None, (r.job.get("model") or {}).get("name"))
        )
        if reports:
            chosen.append(replace(file, reports=reports))
    if not chosen:
        place = records or files[0].path
        raise InputError(f"{place} has no such measured runs; allowed: at least one ('zerocast measure' adds them)")
    return chosen, left_out


def _profiles(file: RecordFile, given: Any, records: Path | None, store_path: Path | None) -> list[Any]:
    """The profile that was given, else the one beside the file, else those beside the store.

    A folder of records stands on its own: without a profile beside one of its files, that file has none.
    """
    from dashboard.profiles import profiles_beside

    if given or file.profile:
        return [given or file.profile]
    return [] if records is not None and records.is_dir() else profiles_beside(store_path)


def _write_files(out: Outputs, files: list[RecordFile], result: Compared, want: Wanted, made_by: str) -> list[str]:
    """Writes plots and page; returns what to say about them."""
    from validator.compare import GATED

    said: list[str] = []
    if out.plots is not None:
        from dashboard.plots import write_plots

        written, missing = write_plots(result.comparison, out.plots, want.terms or GATED)
        said += [f"wrote {path}" for path in written] + missing
    if out.page is not None:
        from zerocast.accuracy import accuracy_page

        out.page.write_text(accuracy_page(files, result, made_by), encoding="utf-8")
        said.append(f"wrote {out.page}")
    return said


def _groups(result: Compared, want: Wanted) -> list[tuple[GroupSummary, ...]]:
    """One table per grouping; of those nobody asked for, the ones with a single group say nothing new."""
    from validator.compare import GATED, group_errors

    c = result.comparison
    tables = [group_errors(c.rows, c.settings, by, want.terms or GATED) for by in want.groupings or GROUPS_SHOWN]
    return [table for table in tables if table and (want.groupings or len({g.group for g in table}) > 1)]


def _left_out_lines(left_out: list[Path]) -> list[str]:
    return [f"not compared: {path.name} holds no records of steps" for path in left_out]


def _write_json(result: Compared, want: Wanted, left_out: list[Path], failures: list[str], said: list[str]) -> None:
    from zerocast.show import write_json

    write_json(
        {
            **result.comparison.to_dict(),
            "groups": [asdict(group) for table in _groups(result, want) for group in table],
            "left_out": [str(path) for path in left_out],
            "refused": result.refused,
            "failures": failures,
            "written": said,
        }
    )


def _show(result: Compared, want: Wanted, n_measured: int, said: list[str]) -> None:
    from dashboard.data import blame_table, compared_rows, group_table, refusals, summary_table
    from zerocast.show import say, show_rows

    c = result.comparison
    say(f"{n_measured} measured runs, {len(result.predicted)} jobs forecast\n")
    moved = {row["term"] for row in compared_rows(c.rows)}
    summaries = summary_table(s for s in c.summaries if s.term in (want.terms or moved))
    show_rows("Error of each term (predicted against measured)", summaries, left=("term",))
    for table in _groups(result, want):
        by = table[0].by
        show_rows(f"Error by {by}", group_table(table), left=(by, "term"))
    about = [b for b in c.blames if b.is_bug or b.total in want.terms]
    blames = about if {b.total for b in c.blames} & set(want.terms) else c.blames
    worst = [{k: v for k, v in row.items() if k != "error"} for row in blame_table(blames[: want.worst])]
    if worst:
        show_rows("Worst first", worst, left=("run", "backend", "what"))
    for place, correlation in c.step_rank_correlation.items():
        if correlation is not None:
            say(f"{place}: rank correlation of step times {correlation:.3f}")
    for origin, (inside, n) in c.step_in_interval.items():
        say(f"{origin}: {inside} of {n} step times lie within the interval of their forecast")
    say(f"bytes on the wire: {'all equal' if not c.inexact else f'{len(c.inexact)} differ'}")
    for reason, keys in refusals(result.refused).items():
        say(f"no forecast for {f'{len(keys)} jobs' if len(keys) > 1 else f'job {keys[0]}'}: {reason}")
    for line in said:
        say(line)
