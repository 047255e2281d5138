"""One PNG of errors of published step times: against the step's length, and how they are distributed. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from math import expm1
from pathlib import Path

import numpy as np

from dashboard.plots import COLOURS, MARKERS
from estimator.errors import InputError

_DPI = 110
_WIDEST_PCT = 60.0
"""Errors beyond are drawn on the edge."""


def write_left_out_plot(path: Path, seconds: Mapping[str, float], errors: Mapping[str, Mapping[str, float]]) -> None:
    """``seconds`` published by run, and by framework the logarithm of forecast over published seconds of each run, whose model was
    left out of all constants. Raises ``InputError`` when ``path`` cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    over_time, spread = figure.subplots(1, 2, width_ratios=(3, 2))
    edges = np.linspace(-_WIDEST_PCT, _WIDEST_PCT, 49)
    bottom = np.zeros(len(edges) - 1)
    for i, (framework, own) in enumerate(sorted(errors.items())):
        runs = [run for run in own if run in seconds]
        percent = np.clip([100 * expm1(own[run]) for run in runs], -_WIDEST_PCT, _WIDEST_PCT)
        colour, label = COLOURS[i % len(COLOURS)], f"{framework} ({len(runs)})"
        marker = MARKERS[i // len(COLOURS) % len(MARKERS)]
        over_time.scatter(
            [seconds[run] for run in runs], percent, s=22, alpha=0.75, color=colour, label=label, marker=marker
        )
        counts, _ = np.histogram(percent, edges)
        spread.bar(edges[:-1], counts, np.diff(edges), bottom=bottom, align="edge", color=colour)
        bottom += counts
    for axes in (over_time, spread):
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    over_time.set_xscale("log")
    over_time.axhline(0, color="#444", linewidth=0.8)
    over_time.set_ylim(-_WIDEST_PCT - 3, _WIDEST_PCT + 3)
    over_time.set_xlabel("published seconds of a step")
    over_time.set_ylabel("forecast / published - 1, %")
    over_time.legend(fontsize=8, loc="upper right")
    spread.set_xlabel("forecast / published - 1, %")
    spread.set_ylabel("runs")
    figure.suptitle("Step times of published runs, each forecast without any run of its model", fontsize=11)
    try:
        figure.savefig(path, dpi=_DPI, metadata={"Software": ""})
    except OSError as error:
        raise InputError(f"plot {str(path)!r} cannot be written: {error.strerror or error}") from None
