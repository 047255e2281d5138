"""What people see: reports as tables. Numbers come from ``dashboard.data``; bytes become GiB and seconds ms only here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dashboard.data import Row, compared_table, memory_rows, needed_bytes, quantity, strategy_rows, time_rows
from estimator.report import PHASES
from estimator.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from estimator.job import Job
    from estimator.report import StepReport

PLAIN_WIDTH = 140
"""Columns when the output is no terminal (a file, a pipe)."""


@lru_cache(maxsize=2)
def console(stderr: bool = False) -> Console:
    """The console of standard output (or standard error)."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, highlight=False, width=None if stream.isatty() else PLAIN_WIDTH)


def write_json(data: Any) -> None:
    """``data`` as JSON on standard output."""
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def say(text: str) -> None:
    """One line of plain text."""
    console().print(escape(text), soft_wrap=True)


def progress() -> Progress:
    """A progress bar on standard error, so that standard output stays clean; none where that is no terminal."""
    target = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=target, transient=True, disable=not target.is_terminal)


def table(title: str, columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> None:
    """A table; ``columns`` are ``(heading, "left" | "right")``."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if title:
        console().print(f"[bold]{escape(title)}[/bold]", soft_wrap=True)
    for heading, justify in columns:
        grid.add_column(escape(heading), justify="right" if justify == "right" else "left")
    for row in rows:
        grid.add_row(*(escape(cell) for cell in row))
    console().print(grid)


def show_rows(title: str, rows: Sequence[Row], left: Sequence[str]) -> None:
    """A table of rows that hold text under the same headings; those in ``left`` are set to the left."""
    heads = [(name, "left" if name in left else "right") for name in rows[0]] if rows else []
    table(title, heads, [[str(cell) for cell in row.values()] for row in rows])


def bytes_cell(n_bytes: float | None) -> str:
    return "-" if n_bytes is None else format_bytes(n_bytes)


def seconds_cell(seconds: float | None) -> str:
    return "-" if seconds is None else format_seconds(seconds)


def percent_cell(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f} %"


def rate_cell(per_s: float | None) -> str:
    return "-" if per_s is None else f"{per_s:,.0f}"


def job_title(job: Job) -> str:
    """The job in one line."""
    s, w, c = job.strategy, job.workload, job.cluster
    parts = [
        job.model.name, f"{c.n_gpus} x {c.gpu.name}", f"ZeRO-{s.zero_stage}", s.dtype, f"seq {w.seq_len}",
        f"micro-batch {w.micro_batch_size}", f"global batch {w.global_batch_size}",
    ]  # fmt: skip
    if s.framework != "zerocast":
        parts.insert(2, s.framework)
    if s.pp > 1:
        parts.append(f"pp {s.pp} {s.pp_schedule}" + (f" x {s.virtual_pp}" if s.virtual_pp > 1 else ""))
    if s.has_servers:
        parts.append(f"parameter servers {s.n_servers}" + (f", staleness {s.staleness}" if s.staleness else ""))
    if s.offload != "none":
        parts.append(f"offload {s.offload_words}")
    if s.recompute != "none":
        parts.append(f"recompute {s.recompute}")
    return " | ".join(parts)


def show_report(report: StepReport, title: str) -> None:
    """One forecast or measurement: memory, time, key figures, notes."""
    console().print(f"[bold]{escape(title)}[/bold]\n")
    show_memory(report)
    if report.time_parts_s:
        rows = [(r["label"], seconds_cell(r["seconds"]), percent_cell(r["share"])) for r in time_rows(report)]
        table("Time of one step", [("part", "left"), ("time", "right"), ("share", "right")], rows)
    if report.step_s is not None:
        low_high = ""
        if report.step_low_s is not None and report.step_high_s is not None:
            low_high = f" ({seconds_cell(report.step_low_s)} to {seconds_cell(report.step_high_s)})"
        say(
            f"step {seconds_cell(report.step_s)}{low_high} | {rate_cell(report.tokens_per_s)} tokens/s | MFU {percent_cell(report.mfu)}"
        )
    for note in report.notes:
        say(f"note: {note}")


def show_memory(report: StepReport) -> None:
    """Memory by category at the peak and at the peak of each phase, the peak's place, and the verdict."""
    phases = [phase for phase in PHASES if phase in report.phase_category_bytes]
    known = memory_rows(report)

    def cells(values: Iterable[int]) -> list[str]:
        return [bytes_cell(value) if value else "" for value in values]

    rows = []
    for row in known:
        by_phase = (report.phase_category_bytes[phase].get(row["category"], 0) for phase in phases)
        rows.append((row["label"], *cells([row["at_peak_bytes"], *by_phase])))
    if rows:
        sums = (sum(report.phase_category_bytes[phase].values()) for phase in phases)
        rows.append(("together", *cells([sum(r["at_peak_bytes"] for r in known), *sums])))
    names = ["between steps" if phase == "init" else phase for phase in phases]
    table("Memory of one GPU", [("category", "left"), ("at the peak", "right"), *((n, "right") for n in names)], rows)
    place = f", reached in {report.peak_where or report.peak_phase}" if report.peak_where or report.peak_phase else ""
    say(f"peak of live tensors {bytes_cell(report.peak_allocated_bytes)}{place}")
    if report.peak_reserved_bytes is not None:
        say(f"reserved by the allocator {bytes_cell(report.peak_reserved_bytes)}")
    needed = needed_bytes(report)
    if report.fits is False and report.explanation:
        say(report.explanation)
    elif report.capacity_bytes and needed is not None:
        verdict = report.explanation or {True: "fits", False: "does not fit", None: "unknown"}[report.fits]
        say(f"needs {bytes_cell(needed)} of {bytes_cell(report.capacity_bytes)}: {verdict}")
    if report.fits_probability is not None and 0.001 < report.fits_probability < 0.999:
        say(f"how likely it is to fit: {percent_cell(report.fits_probability)}")
    if report.host_bytes:
        say(f"host memory of this rank {bytes_cell(report.host_bytes)}, pinned {bytes_cell(report.pinned_bytes)}")
    say("")


STRATEGY_COLUMNS = [
    ("ZeRO", "right"), ("offload", "left"), ("recompute", "left"), ("micro", "right"), ("needs", "right"), ("host", "right"),
    ("fits", "left"), ("step", "right"), ("tokens/s", "right"), ("MFU", "right"),
]  # fmt: skip


def strategy_cells(row: Row) -> list[str]:
    """A row of ``dashboard.data.strategy_row`` under ``STRATEGY_COLUMNS``."""
    return [
        str(row["zero_stage"]), row["offload"], row["recompute"], str(row["micro_batch_size"]),
        bytes_cell(row["needed_bytes"]), bytes_cell(row["host_bytes"] or None), "yes" if row["fits"] else "no",
        seconds_cell(row["step_s"]), rate_cell(row["tokens_per_s"]), percent_cell(row["mfu"]),
    ]  # fmt: skip


def show_strategies(title: str, reports: Iterable[StepReport]) -> None:
    """Strategies side by side, by stage and offload."""
    table(title, STRATEGY_COLUMNS, [strategy_cells(row) for row in strategy_rows(reports)])


def show_comparison(title: str, rows: Iterable[Row]) -> None:
    """Predicted beside measured with the error of each term (rows of ``dashboard.data.compared_rows``)."""
    columns = [("term", "left"), ("predicted", "right"), ("measured", "right"), ("error", "right")]
    table(title, columns, [list(row.values()) for row in compared_table(rows)])


def show_side_by_side(title: str, rows: Sequence[Row], columns: dict[str, str]) -> None:
    """Several runs beside each other: one line per term, ``predicted / measured`` of each run.

    ``rows`` are ``dashboard.data.compared_rows``; ``columns`` maps a job key to its heading.
    """
    by_label: dict[str, dict[str, str]] = {}
    for row in rows:
        predicted, measured = quantity(row["term"], row["predicted"]), quantity(row["term"], row["measured"])
        number, _, unit = predicted.partition(" ")
        cell = f"{number if unit == measured.partition(' ')[2] else predicted} / {measured}"
        by_label.setdefault(row["label"].partition(": ")[2] or row["label"], {})[row["job_key"]] = cell
    heads = [("predicted / measured", "left"), *((heading, "right") for heading in columns.values())]
    table(title, heads, [(label, *(cells.get(key, "-") for key in columns)) for label, cells in by_label.items()])
