"""How well constants forecast runs that took no part in them: each group of runs is left out in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from estimator.time.stack import PRIOR, Chip, Stack, typical
from validator.published.fit import LOOSENESS, Case, ChipFits, fit_lines

GROUPS: dict[str, Callable[[Case], str]] = {
    "model": lambda case: case.model,
    "gpus": lambda case: str(case.n_gpus),
    "source": lambda case: case.source,
    "gpu": lambda case: case.gpu,
    "framework": lambda case: case.framework,
}
"""What is left out at a time: all runs of a model, of a number of GPUs, of a source, of a type of GPU, of a framework."""


class Residual(NamedTuple):
    """One run forecast with constants that it took no part in."""

    case: Case
    by: str
    log_error: float
    """Logarithm of forecast over published seconds."""


def residuals(cases: Mapping[str, Sequence[Case]], fits: Mapping[str, ChipFits], by: str) -> list[Residual]:
    """Of every one of ``cases`` (by framework), with its group ``by`` left out of all constants.

    Constants are those that ``estimator.time.stack`` would take: the framework's on that chip, else the framework's, else medians over
    what is nearest. They are found without the group's runs, but along derivatives that were taken where all runs had led (``fits``),
    as fitting all over again for every group would take many times as long; the errors are those of whole forecasts.
    The *form* of the model (which constants there are, their ranges, what the operators cost) was chosen by people who saw all rows.
    """
    group_of, found = GROUPS[by], []
    for framework, own in cases.items():
        others = [fit.together for name, fit in fits.items() if name != framework]
        elsewhere = typical(others) if others else PRIOR
        for group in sorted({group_of(case) for case in own}):
            stacks = None
            if framework in fits:
                stacks = _without(own, fits[framework], [group_of(case) != group for case in own])
            for case in own:
                if group_of(case) == group:
                    stack = elsewhere if stacks is None else stacks.get(case.chip, stacks["*"])
                    found.append(Residual(case, by, case.error(stack)))
    return found


def _without(own: Sequence[Case], fits: ChipFits, stays: Sequence[bool]) -> dict[Chip | str, Stack] | None:
    """Constants of those that stay: over all GPUs (``*``), and by chip; ``None`` where none stays."""
    rest = [index for index, stay in enumerate(stays) if stay]
    if not rest:
        return None
    together = fit_lines(fits.lines.of(rest), PRIOR)
    stacks: dict[Chip | str, Stack] = {"*": together}
    for chip, lines in fits.chip_lines.items():
        places = [index for index, case in enumerate(own) if case.chip == chip]
        kept = [place for place, index in enumerate(places) if stays[index]]
        if kept:
            stacks[chip] = fit_lines(lines.of(kept), together, LOOSENESS)
    return stacks
