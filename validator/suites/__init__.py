"""Suites: job matrices as TOML files, expanded into cases with the most informative ones first.

A file has the key ``about``, keys shared by all matrices, and one ``[[matrix]]`` table per matrix. The keys are those of
``JobOptions`` (``model``, ``gpu``, ``zero``, ...) and of ``Case`` (``backend``, ``steps``, ...); a list is an axis, and a
matrix is the product of its axes. ``gpu = "here"`` is the GPU of this machine. With ``search = "micro_batch"`` each
combination is a boundary: the campaign bisects the largest micro-batch that fits, from 1 to ``largest``.
``measure = "kernels"`` marks a suite of kernels instead of jobs (``validator.kernels.suite``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from estimator.errors import InputError, unknown_choice
from estimator.job import Gpu, Host, Job
from estimator.job.fields import known_keys, read_file, shown, table, text, whole
from estimator.job.options import JobOptions, build_job
from estimator.memory.reader import StepMemory
from estimator.predict import lay_out, memory_of, predict
from estimator.units import format_bytes
from validator.measure.case import Case, needs_files

__all__ = [
    "Boundary", "LeftOut", "Place", "Plan", "Suite", "combinations_of", "expand", "load_suite", "most_informative_first",
    "read_suite", "suite_names",
]  # fmt: skip

FOLDER = Path(__file__).parent
JOB_KEYS = tuple(f.name for f in fields(JobOptions))
CASE_KEYS = ("backend", "steps", "warmup", "rank", "seed", "time_limit_s", "metered", "reference")
SUITE_KEYS = ("about", "measure", "matrix", "search", "largest")
MEASURES = ("steps", "kernels")
"""What a suite measures."""
MAX_COMBINATIONS = 4096
"""Largest suite: more could not be run in a day."""
HOPELESS = 1.25
"""Cases forecast beyond this many times the GPU's memory come last: that they fail says little."""
HOST_SHARE = 0.7
"""Largest part of the free host memory that a case may be forecast to pin: beyond it the machine is at risk."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One file: what it asks, and its combinations as plain settings in the order of the file."""

    name: str
    about: str
    combinations: tuple[dict[str, Any], ...]
    search: bool = False
    """Whether each combination stands for a search of the largest micro-batch."""
    largest: int = 1
    """Where that search ends."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The machine that a suite is expanded for."""

    gpu_here: str | None = None
    """Catalogue name of its GPU: what ``gpu = "here"`` means; ``None``: there is none."""
    free_host_bytes: int | None = None
    """Host memory that cases may use; ``None``: not known, nothing is left out for it."""
    local_gpu: Gpu | None = None
    """This machine as ``calibrate`` measured it: what ``gpu = "cpu"`` means; likewise ``local_host``."""
    local_host: Host | None = None
    nvme_folder: str | None = None
    """Where jobs with offload ``optimizer:nvme`` have their files; ``None``: they are left out."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A combination that is no case, and why."""

    settings: dict[str, Any]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A job whose largest micro-batch is searched."""

    settings: dict[str, Any]
    place: Place
    largest: int

    def case_at(self, micro_batch: int) -> Case:
        """The case with ``micro_batch`` sequences per pass."""
        return _case({**self.settings, "micro_batch": micro_batch}, self.place)

    @property
    def label(self) -> str:
        return self.case_at(1).label.replace(" mb1 ", " ", 1)

    def forecast(self) -> int:
        """Largest micro-batch that is forecast to fit, 0 to ``largest``: more never takes less memory."""
        low, high = 0, self.largest + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if predict(self.case_at(middle).job).fits else (low, middle)
        return low


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a campaign is to run, most informative first."""

    suite: str
    cases: tuple[Case, ...] = ()
    boundaries: tuple[Boundary, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


def suite_names() -> tuple[str, ...]:
    """Names of the shipped suites."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def read_suite(name: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the shipped suite ``name``, or of the TOML or JSON file at that path. Raises ``InputError``."""
    if name in suite_names():
        path = FOLDER / f"{name}.toml"
    elif name.endswith((".toml", ".json")):
        path = Path(name)
    else:
        raise unknown_choice("suite", name, (*suite_names(), "a path that ends with .toml"))
    data = table(f"suite {path.stem!r}", read_file(path, "suite"))
    if data.get("measure", "steps") not in MEASURES:
        raise unknown_choice(f"suite {path.stem!r}: measure", data["measure"], MEASURES)
    return path.stem, data


def combinations_of(
    where: str, data: dict[str, Any], keys: tuple[str, ...], own: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Every combination in the matrices of a suite's ``data``: ``keys`` may stand in a matrix or, shared by all, beside
    the suite's ``own`` keys. Raises ``InputError``."""
    known_keys(where, data, (*own, *keys))
    shared = {key: value for key, value in data.items() if key not in own}
    matrices = data.get("matrix", [{}])
    if not isinstance(matrices, list):
        raise InputError(f"{where}: matrix is {shown(matrices)}; allowed: one [[matrix]] table per matrix")
    combinations: list[dict[str, Any]] = []
    for matrix in matrices:
        known_keys(f"{where}: matrix", table(f"{where}: matrix", matrix), keys)
        combinations += _product(where, {**shared, **matrix}, MAX_COMBINATIONS - len(combinations))
    return combinations


def load_suite(name: str) -> Suite:
    """The suite of jobs that ``read_suite`` finds under ``name``. Raises ``InputError``."""
    stem, data = read_suite(name)
    where = f"suite {stem!r}"
    if data.get("measure") == "kernels":
        raise InputError(f"{where} measures kernels; allowed here: a suite of jobs")
    combinations = combinations_of(where, data, (*JOB_KEYS, *CASE_KEYS), SUITE_KEYS)
    search = data.get("search")
    if search not in (None, "micro_batch"):
        raise InputError(f"{where}: search is {shown(search)}; allowed: 'micro_batch'")
    if search and any("micro_batch" in c for c in combinations):
        raise InputError(f"{where}: micro_batch is both given and searched; allowed: one of them")
    return Suite(
        name=stem,
        about=text(f"{where}: about", data.get("about", "")),
        combinations=tuple(combinations),
        search=search is not None,
        largest=whole(f"{where}: largest", data.get("largest", 4096)),
    )


def _product(where: str, matrix: dict[str, Any], most: int) -> list[dict[str, Any]]:
    axes = {key: value if isinstance(value, list) else [value] for key, value in matrix.items()}
    for key, values in axes.items():
        if not values:
            raise InputError(f"{where}: {key} is an empty list; allowed: at least one value")
        if any(isinstance(value, list | dict) for value in values):
            raise InputError(f"{where}: {key} is {shown(matrix[key])}; allowed: a value or a list of values")
    if np.prod([float(len(values)) for values in axes.values()]) > most:
        raise InputError(f"{where} has more than {MAX_COMBINATIONS} combinations; allowed: fewer or shorter axes")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def expand(suite: Suite, place: Place) -> Plan:
    """The cases of ``suite`` on the machine at ``place``, and what is left out with its reason.

    Every combination goes through the job's own door; what is refused there is left out, and so is a combination that
    repeats the step of an earlier one, or that would take the machine's host memory.
    """
    settings: list[dict[str, Any]] = []
    cases: list[Case] = []
    left_out: list[LeftOut] = []
    hopeless: list[bool] = []
    seen: dict[tuple[str, str, int], Case] = {}
    for combination in suite.combinations:
        try:
            case = _case({**combination, "micro_batch": 1} if suite.search else combination, place)
            reason = _repeats(case, seen)
            memory = memory_of(lay_out(case.job)) if case.on_cuda and not reason else None
            reason = reason or (_too_much_for_host(case, memory, place) if memory else None)
        except InputError as error:
            reason = str(error)
        if reason:
            left_out.append(LeftOut(settings=combination, reason=reason))
            continue
        settings.append(combination)
        cases.append(case)
        hopeless.append(bool(memory and memory.peak_bytes > HOPELESS * case.job.cluster.gpu.memory_bytes))
    order = list(most_informative_first(settings))
    if suite.search:
        boundaries = tuple(Boundary(settings=settings[i], place=place, largest=suite.largest) for i in order)
        return Plan(suite=suite.name, boundaries=boundaries, left_out=tuple(left_out))
    order.sort(key=lambda i: hopeless[i])
    return Plan(suite=suite.name, cases=tuple(cases[i] for i in order), left_out=tuple(left_out))


def _case(settings: dict[str, Any], place: Place) -> Case:
    for key in ("model", "gpu", "backend"):
        if key not in settings:
            raise InputError(f"{key} is not given; a suite needs it")
    options = {key: value for key, value in settings.items() if key in JOB_KEYS}
    if options["gpu"] == "here":
        if place.gpu_here is None:
            raise InputError("gpu is 'here', but this machine has no GPU that torch can use; allowed: a catalogue name")
        options["gpu"] = place.gpu_here
    job = build_job(JobOptions(**options), local_gpu=place.local_gpu, local_host=place.local_host)
    how = {key: value for key, value in settings.items() if key in CASE_KEYS}
    if needs_files(job, settings["backend"]):
        how["nvme_folder"] = place.nvme_folder
    return Case(job=job, **how)


def _repeats(case: Case, seen: dict[tuple[str, str, int], Case]) -> str | None:
    """Which of ``seen`` takes the same step as ``case``; ``None`` when none does (it is then added)."""
    identity = (case.backend, _key_in_effect(case.job), case.rank if case.plays_one_rank else 0)
    if identity in seen:
        same = (
            "on one data-parallel GPU every stage runs as stage 0"
            if case.job.mesh.n_data == 1
            else "it is listed twice"
        )
        return f"the same step as {seen[identity].label}: {same}"
    seen[identity] = case
    return None


def _too_much_for_host(case: Case, memory: StepMemory, place: Place) -> str | None:
    host_bytes = memory.host_peak_bytes * case.n_processes
    if place.free_host_bytes is None or host_bytes <= HOST_SHARE * place.free_host_bytes:
        return None
    free = format_bytes(place.free_host_bytes)
    return f"it would pin {format_bytes(host_bytes)} of the {free} of host memory that are free"


def _key_in_effect(job: Job) -> str:
    return replace(job, strategy=replace(job.strategy, zero_stage=job.zero_stage)).key


def most_informative_first(settings: Sequence[dict[str, Any]]) -> Iterator[int]:
    """Indices of ``settings``: each next one shows the most pairs of axis values that no earlier one has shown.

    Greedy pairwise coverage (Cohen et al. 1997, "The AETG system"); the order of the file decides between equals. Once
    every pair has been shown, counting starts again among the rest.
    """
    if not settings:
        return
    values = {key: list(dict.fromkeys(str(s.get(key)) for s in settings)) for key in sorted(set().union(*settings))}
    keys = [key for key in values if len(values[key]) > 1]
    codes = np.array([[values[key].index(str(s.get(key))) for key in keys] for s in settings], dtype=np.int64)
    pairs = list(itertools.combinations(range(len(keys)), 2)) or [(k, k) for k in range(len(keys))]
    n = len(settings) + 1
    shown_by = np.stack(
        [(place * n + codes[:, a]) * n + codes[:, b] for place, (a, b) in enumerate(pairs)], axis=1
    ) if pairs else np.zeros((len(settings), 1), dtype=np.int64)  # fmt: skip
    _, shown_by = np.unique(shown_by, return_inverse=True)
    shown_by = shown_by.reshape(len(settings), -1)
    is_new = np.ones(shown_by.max() + 1, dtype=bool)
    left = np.ones(len(settings), dtype=bool)
    for _ in range(len(settings)):
        gain = np.where(left, is_new[shown_by].sum(axis=1), -1)
        if gain.max() == 0:
            is_new[:] = True
            gain = np.where(left, shown_by.shape[1], -1)
        best = int(gain.argmax())
        left[best] = False
        is_new[shown_by[best]] = False
        yield best
