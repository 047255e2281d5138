"""Constants of software stacks (``estimator.time.stack``), fitted to published step times.

Two levels, as there are few runs of each framework and GPU: constants of a framework over all GPUs, held near what physics
expects (``RANGES``), and those of the framework on one chip, held near the first (GPUs of one chip differ in memory, links and power,
which the forecast knows). Gauss-Newton on the logarithm of forecast over
published seconds. Errors beyond what most have weigh by their size, not its square: published runs have outliers. Where even
the best constants leave large errors, what is missing is no constant, and the expected ones are held more firmly.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import log
from typing import NamedTuple, Protocol

import numpy as np

from estimator.job.job import Job
from estimator.predict import Blueprint, lay_out_stages
from estimator.time.pipeline import time_of_pipeline
from estimator.time.player import StepTime, time_of
from estimator.time.profile import profile_for
from estimator.time.stack import PRIOR, RANGES, UNTOLD, Chip, Stack, chip_of

NOISE = 0.015
"""Relative error of a published step time that is no surprise: 55 configurations published twice differ by 1% in the median."""

_NORMAL = 1.4826
"""Standard deviation of normal errors over their median size."""

LOOSENESS = 0.5
"""How much nearer constants on one chip are held to the framework's than those to physics."""

ROUNDS = 4
"""Linearisations at most."""

_NAMES = tuple(RANGES)
_LOW = np.array([r.low for r in RANGES.values()])
_HIGH = np.array([r.high for r in RANGES.values()])
_STEPS = np.array([1e-3 if r.low > 0 else min(1e-4, r.width / 20) for r in RANGES.values()])
_WIDTH = np.array([r.width for r in RANGES.values()])


class Timed(Protocol):
    """Something whose seconds are known, and can be forecast."""

    def error(self, stack: Stack) -> float:
        """Logarithm of forecast over known seconds."""


@dataclass(frozen=True, eq=False)
class Case:
    """One published run that can be forecast. What was worked out for it is kept."""

    run_id: str
    source: str
    framework: str
    gpu: str
    """Of the catalogue."""
    model: str
    n_gpus: int
    seconds: float
    job: Job
    known_s: dict[Stack, float] = field(default_factory=dict)
    """Forecast seconds, which cases of equal jobs share."""

    @property
    def chip(self) -> Chip:
        return chip_of(self.job.cluster.gpu)

    def error(self, stack: Stack) -> float:
        """Logarithm of forecast over published seconds."""
        seconds = self.known_s.get(stack)
        if seconds is None:
            seconds = self.known_s[stack] = self._time(stack).step_s
        return log(seconds / self.seconds)

    @cached_property
    def _blueprints(self) -> list[Blueprint]:
        return lay_out_stages(self.job)

    def _time(self, stack: Stack) -> StepTime:
        blueprints, job, (curves, _) = self._blueprints, self.job, profile_for(self.job.cluster.gpu)
        if job.strategy.pp == 1:
            return time_of(blueprints[0].program, blueprints[0].costs, job, curves, stack)
        return time_of_pipeline([(b.program, b.costs) for b in blueprints], job, curves, stack)


class Lines(NamedTuple):
    """Errors of cases near a point, to first order: ``errors`` ``[cases]`` there and their derivatives ``[cases, constants]``."""

    at: np.ndarray
    errors: np.ndarray
    slopes: np.ndarray

    def of(self, chosen: Sequence[int]) -> Lines:
        return Lines(self.at, self.errors[chosen], self.slopes[chosen])


class ChipFits(NamedTuple):
    """Constants of one framework, those on each chip, and how errors change near both."""

    together: Stack
    by_chip: dict[Chip, Stack]
    lines: Lines
    """Near ``together``, of all cases."""
    chip_lines: dict[Chip, Lines]
    """Near each of ``by_chip``, of the cases on it."""


def fit_chips(cases: Sequence[Case]) -> ChipFits:
    """Constants of the framework of which all ``cases`` are."""
    together, lines = fit(cases, PRIOR)
    by_chip, chip_lines = {}, {}
    for chip in sorted({case.chip for case in cases}):
        own = [case for case in cases if case.chip == chip]
        by_chip[chip], chip_lines[chip] = fit(own, together, LOOSENESS)
    return ChipFits(together, by_chip, lines, chip_lines)


def fit(
    cases: Sequence[Timed], near: Stack, looseness: float = 1.0, untold: Collection[str] = UNTOLD
) -> tuple[Stack, Lines]:
    """The constants that forecast ``cases`` best, held near ``near`` by ``looseness`` times the widths of ``RANGES``; those
    ``untold`` stay there."""
    x = _values(near)
    for _ in range(ROUNDS):
        lines = _lines(cases, x, untold)
        moved = _values(fit_lines(lines, near, looseness))
        done = np.abs(moved - x).max() < 0.003
        x = moved
        if done:
            break
    return _stack(x), _lines(cases, x, untold)


def fit_lines(lines: Lines, near: Stack, looseness: float = 1.0) -> Stack:
    """``fit`` as far as the first order goes."""
    held, width = _values(near), _WIDTH * looseness
    x = lines.at.copy()
    for _ in range(12):
        errors = lines.errors + lines.slopes @ (x - lines.at)
        noise = max(NOISE, _NORMAL * float(np.median(np.abs(errors)))) if len(errors) else NOISE
        weight = np.sqrt(1.0 / np.maximum(np.abs(errors) / noise, 1.0)) / noise
        rows = np.vstack([lines.slopes * weight[:, None], np.diag(1.0 / width)])
        goal = np.concatenate([-errors * weight, (held - x) / width])
        moved = _bounded(rows, goal, x)
        done = np.abs(moved - x).max() < 1e-5
        x = moved
        if done:
            break
    return _stack(x)


def _values(stack: Stack) -> np.ndarray:
    return np.array([asdict(stack)[name] for name in _NAMES])


def _stack(x: np.ndarray) -> Stack:
    return Stack(**{name: round(float(value), 7) for name, value in zip(_NAMES, x, strict=True)})


def _lines(cases: Sequence[Timed], x: np.ndarray, untold: Collection[str]) -> Lines:
    errors = np.array([case.error(_stack(x)) for case in cases])
    slopes = np.zeros((len(cases), len(x)))
    for k in range(len(x)):
        if _NAMES[k] in untold:
            continue
        step = _STEPS[k] if x[k] + _STEPS[k] <= _HIGH[k] else -_STEPS[k]
        beside = x.copy()
        beside[k] += step
        slopes[:, k] = (np.array([case.error(_stack(beside)) for case in cases]) - errors) / step
    return Lines(x, errors, slopes)


def _bounded(rows: np.ndarray, goal: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``x`` plus the least-squares step of ``rows`` to ``goal``; what would leave its range is put on its end and kept there."""
    base, free = x.copy(), np.ones(len(x), dtype=bool)
    goal = goal.copy()
    while True:
        step = np.zeros(len(x))
        if free.any():
            step[free] = np.linalg.lstsq(rows[:, free], goal, rcond=None)[0]
        out = np.flatnonzero(free & ((base + step < _LOW - 1e-12) | (base + step > _HIGH + 1e-12)))
        if not len(out):
            return np.clip(base + step, _LOW, _HIGH)
        for k in out:
            end = _LOW[k] if base[k] + step[k] < _LOW[k] else _HIGH[k]
            goal -= rows[:, k] * (end - base[k])
            base[k] = end
        free[out] = False
