"""PNG plots of a comparison: predicted against measured, and what is left over. Needs matplotlib, imported when used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dashboard.data import term_label
from estimator.errors import InputError
from estimator.units import GIB
from validator.compare import GROUPINGS, Comparison, group_rows

if TYPE_CHECKING:
    from validator.compare import Row

COLOURS = ("#1f4e8c", "#d9822b", "#2a8c6a", "#6a4c9c", "#c9534f", "#7a7f87", "#c9a26b", "#5b8fd0")
"""One per group; with more groups they begin again with another marker."""
MARKERS = ("o", "s", "^", "D")
BAND = 0.10
"""Half-width of the band around "predicted = measured"."""
_DPI = 120
_SMALLEST_AXIS = 0.01
"""Errors are drawn on an axis of at least plus and minus this, so that noise of rounding looks like none."""


def write_plots(comparison: Comparison, folder: Path, terms: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Three PNGs for each of ``terms`` in ``folder``: scatter, residuals and residuals by group.

    Returns the files, and a sentence for each plot that would show nothing. Raises ``InputError`` when ``folder`` cannot
    be written.
    """
    written: list[Path] = []
    missing: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for term in terms:
            rows = [row for row in comparison.rows if row.term == term]
            drawn = [row for row in rows if row.predicted > 0 and row.measured > 0]
            if not drawn:
                missing.append(f"no plot of {term_label(term)}: no run has both a forecast and a measurement above 0")
                continue
            if len(drawn) < len(rows):
                missing.append(f"not in the plots of {term_label(term)}: {len(rows) - len(drawn)} runs with a 0")
            by = _colour_by(drawn, comparison)
            groups = group_rows(drawn, comparison.settings, by)
            figures = {"scatter": _scatter(term, groups, by), "residuals": _residuals(term, groups, by)}
            panels = _panels(drawn, comparison)
            if panels:
                figures["groups"] = _by_group(term, panels, len(drawn))
            else:
                missing.append(f"no plot of {term_label(term)} by group: all runs are of the same groups")
            for name, figure in figures.items():
                written.append(folder / f"{term}_{name}.png")
                figure.savefig(written[-1], dpi=_DPI)
    except OSError as error:
        raise InputError(f"plots folder {str(folder)!r} cannot be written: {error.strerror or error}") from None
    return written, missing


def _colour_by(rows: Sequence[Row], comparison: Comparison) -> str:
    """The backend; the GPU where only that differs."""
    n_backends, n_gpus = (len(group_rows(rows, comparison.settings, by)) for by in ("backend", "gpu"))
    return "gpu" if n_backends == 1 and n_gpus > 1 else "backend"


def _panels(rows: Sequence[Row], comparison: Comparison) -> dict[str, dict[str, list[Row]]]:
    """The groupings under which ``rows`` fall into several groups."""
    found = {by: group_rows(rows, comparison.settings, by) for by in GROUPINGS}
    return {by: groups for by, groups in found.items() if len(groups) > 1}


def _unit(term: str) -> tuple[str, float]:
    """The unit of a term on an axis, and its size."""
    field = term.partition(".")[0]
    if "bytes" in field:
        return "GiB", GIB
    if field.endswith("per_s"):
        return "tokens/s", 1.0
    return ("ms", 1e-3) if field.endswith("_s") else ("count", 1.0)


def _figure(width: float, height: float, n_rows: int = 1, n_columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(n_rows, n_columns, squeeze=False)


def _points(axes: Any, groups: dict[str, list[Row]], x: Any, y: Any) -> None:
    for i, (name, rows) in enumerate(groups.items()):
        axes.scatter(
            [x(row) for row in rows],
            [y(row) for row in rows],
            s=34,
            alpha=0.75,
            linewidths=0.4,
            edgecolors="white",
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i // len(COLOURS) % len(MARKERS)],
            label=f"{name} ({len(rows)})",
            zorder=3,
        )


def _log(axis: Any) -> None:
    """Plain numbers on a logarithmic axis, the more of them between decades the fewer decades it spans."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    span = high / low
    between = () if span > 100 else (2.0, 5.0) if span > 8 else (1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(base=10, subs=(1.0, *between)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _scatter(term: str, groups: dict[str, list[Row]], by: str) -> Any:
    figure, ((axes,),) = _figure(6.4, 6.0)
    unit, size = _unit(term)
    values = [v / size for rows in groups.values() for row in rows for v in (row.predicted, row.measured)]
    low, high = min(values) / 1.6, max(values) * 1.6
    line = np.array([low, high])
    axes.fill_between(
        line, line * (1 - BAND), line * (1 + BAND), color="#cfd3d8", alpha=0.6, linewidth=0, label=f"within {BAND:.0%}"
    )
    axes.plot(line, line, color="#7a7f87", linewidth=1, label="predicted = measured")
    _points(axes, groups, lambda row: row.measured / size, lambda row: row.predicted / size)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.set_xlabel(f"measured, {unit}")
    axes.set_ylabel(f"predicted, {unit}")
    for axis in (axes.xaxis, axes.yaxis):
        _log(axis)
    axes.grid(alpha=0.25)
    axes.set_title(f"{_capital(term)}: predicted against measured", fontsize=12)
    axes.legend(title=by, fontsize=9, loc="upper left")
    return figure


def _residuals(term: str, groups: dict[str, list[Row]], by: str) -> Any:
    figure, ((axes,),) = _figure(8.0, 4.6)
    unit, size = _unit(term)
    rows = [row for members in groups.values() for row in members]
    measured = [row.measured / size for row in rows]
    reach = _reach(rows)
    _band(axes.axhspan, axes.axhline, reach)
    _points(axes, groups, lambda row: row.measured / size, lambda row: 100 * row.error)
    axes.set(xscale="log", xlim=(min(measured) / 1.6, max(measured) * 1.6), ylim=(-reach, reach))
    axes.set_xlabel(f"measured, {unit}")
    axes.set_ylabel("error, % (above 0: predicted too high)")
    _log(axes.xaxis)
    axes.grid(alpha=0.25)
    axes.set_title(f"{_capital(term)}: error over size", fontsize=12)
    figure.legend(*axes.get_legend_handles_labels(), title=by, fontsize=9, loc="outside right upper")
    return figure


def _by_group(term: str, panels: dict[str, dict[str, list[Row]]], n: int) -> Any:
    """One panel per grouping: every error as a point, and a bar at each group's median."""
    n_columns = min(2, len(panels))
    n_rows = -(-len(panels) // n_columns)
    tallest = max(len(groups) for groups in panels.values())
    figure, grid = _figure(5.6 * n_columns, n_rows * max(2.0, 1.1 + 0.36 * tallest), n_rows, n_columns)
    reach = _reach([row for groups in panels.values() for rows in groups.values() for row in rows])
    jitter = np.random.default_rng(0)
    for axes, (by, groups) in zip(grid.flat, panels.items(), strict=False):
        _band(axes.axvspan, axes.axvline, reach)
        for place, rows in enumerate(groups.values()):
            errors = [100 * (row.error or 0.0) for row in rows]
            heights = place + jitter.uniform(-0.18, 0.18, len(errors))
            axes.scatter(errors, heights, s=16, alpha=0.6, color=COLOURS[0], linewidths=0, zorder=4)
            axes.plot(
                [float(np.median(errors))] * 2, [place - 0.32, place + 0.32], color=COLOURS[1], linewidth=2.5, zorder=3
            )
        axes.set_yticks(range(len(groups)), [f"{name} ({len(rows)})" for name, rows in groups.items()])
        axes.set(xlim=(-reach, reach), ylim=(len(groups) - 0.45, -0.55))
        axes.set_title(f"by {by}", fontsize=10)
        axes.set_xlabel("error, %")
        axes.grid(axis="x", alpha=0.25)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.suptitle(f"{_capital(term)}: error by group, {n} runs (bar: median)", fontsize=12)
    return figure


def _band(span: Any, line: Any, reach: float) -> None:
    """No error, and the band around it where the axis goes beyond it."""
    if reach > 100 * BAND:
        span(-100 * BAND, 100 * BAND, color="#cfd3d8", alpha=0.5, linewidth=0, label=f"within {BAND:.0%}")
    line(0, color="#7a7f87", linewidth=1)


def _reach(rows: Sequence[Row]) -> float:
    """Half the axis of errors, in percent."""
    return 115 * max(_SMALLEST_AXIS, *(row.size for row in rows))


def _capital(term: str) -> str:
    label = term_label(term)
    return label[0].upper() + label[1:]
