"""Baselines of the gate: what each case measured before, by environment, as JSON that people review."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from estimator.errors import InputError, unknown_choice
from estimator.report import StepReport
from validator.compare import label_of
from validator.gate.function_run import FunctionReport
from validator.kernels.report import KernelReport
from validator.measure.yardstick import step_in_yardsticks, yardstick_median
from validator.store.records import report_to_json

VERSION = 2
"""Version of the file's layout; 1 knew training steps only, and no yardstick."""
ENVIRONMENT = ("cpu", "cuda", "driver", "gpu", "host", "torch")
"""What must be equal for two measurements to be comparable."""
Environment = Mapping[str, str | None]
Kind = Literal["step", "kernel", "function"]
Report = StepReport | KernelReport | FunctionReport
"""What the gate can judge: a training step, one kernel, or a function of the user's own tests."""
Identity = tuple[str, str, int | None]
"""Key of the job (or kernel, or the function's name), origin, and the rank where one is played."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One recorded run: one process (group) on one day. The unit of every test, because steps of one run are not independent."""

    record: str
    """First 16 digits of the record's SHA-256: a run is never held against itself."""
    date_utc: str | None = None
    commit: str | None = None
    fits: bool | None = None
    step_s: float | None = None
    """Median of the run's measured steps."""
    tokens_per_s: float | None = None
    peak_allocated_bytes: int | None = None
    yardstick: str | None = None
    """Which fixed piece of work was timed between the steps (``validator.measure.yardstick``); for kernels on a CPU the memory copy."""
    yardstick_s: float | None = None
    """Median of its seconds: how fast the machine was. A kernel's is the time of copying one byte."""
    step_yardsticks: float | None = None
    """The step's length in yardsticks."""
    kernel_bytes_per_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class BaselineCase:
    """One case: how to measure it again, what was forecast, and what it measured."""

    name: str
    kind: Kind = "step"
    job_key: str
    """Of the job, or the kernel's key, or the function's name."""
    origin: str
    """The backend; ``kernel`` or ``function``."""
    rank: int | None = None
    steps: int = 8
    warmup: int = 3
    seed: int = 0
    forecast: dict[str, float] = field(default_factory=dict)
    """The forecast's ``step_s`` and ``peak_allocated_bytes`` when the baseline was made, where there was one."""
    runs: tuple[Run, ...]
    job: dict[str, Any]
    """The job, or what tells the kernel; empty for a function."""

    @property
    def identity(self) -> Identity:
        return self.job_key, self.origin, self.rank


@dataclass(frozen=True, kw_only=True)
class EnvironmentBaseline:
    """The cases of one environment, by name."""

    environment: dict[str, str | None]
    cases: tuple[BaselineCase, ...]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A baseline file."""

    environments: tuple[EnvironmentBaseline, ...] = ()

    def find(self, environment: Environment) -> EnvironmentBaseline | None:
        """The baseline of exactly this environment."""
        return next((e for e in self.environments if e.environment == dict(environment)), None)

    def refusal(self, environment: Environment, path: str | Path) -> InputError:
        """Why ``environment`` cannot be held against this file: what differs from its nearest environment."""
        if not self.environments:
            return InputError(f"baseline {str(path)!r} holds no environment; 'zerocast check --update' adds one")
        differing = [[k for k in ENVIRONMENT if e.environment[k] != environment[k]] for e in self.environments]
        nearest = min(range(len(differing)), key=lambda i: len(differing[i]))
        theirs = self.environments[nearest].environment
        what = "; ".join(
            f"{k} is {_shown(environment[k])} here and {_shown(theirs[k])} there" for k in differing[nearest]
        )
        return InputError(f"baseline {str(path)!r} is from another environment: {what}")


def _shown(value: str | None) -> str:
    return "none" if value is None else repr(value)


def environment_of(provenance: Mapping[str, Any]) -> dict[str, str | None]:
    """The environment in a record's provenance; a key that the record does not know is ``None``."""
    gpu = provenance.get("gpu")
    gpu = gpu if isinstance(gpu, dict) else {}
    values = {
        **{k: provenance.get(k) for k in ENVIRONMENT},
        "gpu": gpu.get("name"),
        "driver": gpu.get("driver_version"),
    }
    return {name: None if (value := values[name]) is None else str(value) for name in ENVIRONMENT}


def identity_of(report: Report) -> Identity:
    """What two reports share when they are runs of one case."""
    if isinstance(report, KernelReport):
        return report.key, "kernel", None
    if isinstance(report, FunctionReport):
        return report.name, "function", None
    return report.job_key, report.origin, report.rank if report.origin in ("fake", "cuda-virtual") else None


def kind_of(report: Report) -> Kind:
    """What ``report`` measured."""
    return (
        "kernel" if isinstance(report, KernelReport) else "function" if isinstance(report, FunctionReport) else "step"
    )


def run_of(report: Report) -> Run:
    """The figures of ``report`` that the gate compares."""
    git = report.provenance.get("git")
    commit = git.get("commit") if isinstance(git, dict) else None
    text = report_to_json(report) if isinstance(report, StepReport) else json.dumps(report.to_dict(), sort_keys=True)
    run = Run(
        record=hashlib.sha256(text.encode()).hexdigest()[:16],
        date_utc=report.provenance.get("date_utc"),
        commit=f"{commit[:12]}{'+' if git.get('dirty') else ''}" if isinstance(git, dict) and commit else None,
    )
    if isinstance(report, KernelReport):
        run = replace(run, kernel_bytes_per_s=report.bytes_per_s)
        if report.device == "cuda" or not report.copy_bytes_per_s:  # a GPU's clocks are recorded instead
            return run
        return replace(run, yardstick="copy of a byte", yardstick_s=1 / report.copy_bytes_per_s)
    tokens = report.tokens_per_s if isinstance(report, StepReport) else None
    return replace(
        run, fits=report.fits if isinstance(report, StepReport) else None, step_s=report.step_s, tokens_per_s=tokens,
        peak_allocated_bytes=report.peak_allocated_bytes, yardstick=report.provenance.get("yardstick"),
        yardstick_s=yardstick_median(report.provenance), step_yardsticks=step_in_yardsticks(report.provenance),
    )  # fmt: skip


def case_name(report: Report) -> str:
    """The case for people, e.g. ``gpt-30m 2x zero2 fp32 seq128 mb1 [cpu]``."""
    if isinstance(report, KernelReport):
        return report.label
    if isinstance(report, FunctionReport):
        return report.name
    rank = identity_of(report)[2]
    return f"{label_of(report)}{f' rank{rank}' if rank else ''} [{report.origin}]"


def update(
    old: Baseline, reports: Iterable[Report], forecasts: Mapping[str, StepReport], newest: int | None = None
) -> Baseline:
    """``old`` with every case in ``reports`` added or replaced; other cases and environments stay as they are.

    ``newest`` keeps that many runs of each case. Forecasts, predictions and runs that did not fit are left out. Raises
    ``InputError`` when nothing is left, or when two jobs share a name.
    """
    groups: dict[tuple[tuple[str | None, ...], Identity], list[Report]] = {}
    for report in reports:
        if not isinstance(report, StepReport) or (report.origin != "predicted" and report.fits is not False):
            place = tuple(environment_of(report.provenance).values())
            groups.setdefault((place, identity_of(report)), []).append(report)
    if not groups:
        raise InputError("there is no measured run that fits among the records; allowed: at least one for a baseline")
    by_place = {tuple(e.environment.values()): {c.identity: c for c in e.cases} for e in old.environments}
    for (place, identity), group in groups.items():
        by_place.setdefault(place, {})[identity] = _case_of(group[-newest:] if newest else group, forecasts)
    environments = [
        EnvironmentBaseline(environment=dict(zip(ENVIRONMENT, place, strict=True)), cases=_named_apart(cases.values()))
        for place, cases in by_place.items()
    ]
    return Baseline(environments=tuple(sorted(environments, key=lambda e: [str(v) for v in e.environment.values()])))


def _named_apart(cases: Iterable[BaselineCase]) -> tuple[BaselineCase, ...]:
    """``cases`` by name; jobs with one name differ in what the name does not show, so their key is added to it."""
    plain = [replace(c, name=c.name.removesuffix(f" {c.job_key}")) for c in cases]
    often = Counter(c.name for c in plain)
    named = [replace(c, name=f"{c.name} {c.job_key}") if often[c.name] > 1 else c for c in plain]
    return tuple(sorted(named, key=lambda c: c.name))


def _case_of(reports: Sequence[Report], forecasts: Mapping[str, StepReport]) -> BaselineCase:
    last = reports[-1]
    key, origin, rank = identity_of(last)
    forecast = forecasts.get(key) if isinstance(last, StepReport) else None
    figures = {} if forecast is None else {n: getattr(forecast, n) for n in ("peak_allocated_bytes", "step_s")}
    runs = {run.record: run for run in map(run_of, reports)}
    return BaselineCase(
        name=case_name(last),
        kind=kind_of(last),
        job_key=key,
        origin=origin,
        rank=rank,
        steps=max(1, int(last.provenance.get("steps") or 1)),
        warmup=int(last.provenance.get("warmup") or 0),
        seed=int(last.provenance.get("seed") or 0),
        forecast={name: value for name, value in figures.items() if value is not None},
        runs=tuple(runs.values()),
        job=_what(last),
    )


def _what(report: Report) -> dict[str, Any]:
    """Enough to measure the same again."""
    if isinstance(report, KernelReport):
        names = ("kernel", "backward", "both", "implementation", "device", "dtype")
        return {n: getattr(report, n) for n in names} | {"shape": list(report.shape), "n_bytes": report.asked_bytes}
    return report.job if isinstance(report, StepReport) else {}


def save_baseline(baseline: Baseline, path: str | Path) -> None:
    """Writes ``path`` in one piece or not at all. Raises ``InputError`` when the place cannot be written."""
    data = {"zerocast_baseline": VERSION, **asdict(baseline)}
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(_pretty(data) + "\n", encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        raise InputError(f"baseline {str(path)!r} cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True) if part.parent.is_dir() else None


def _pretty(value: Any, indent: str = "") -> str:
    """JSON with sorted keys, one run (or list of plain values) per line: a change touches only its own lines."""
    inner = indent + "  "
    if isinstance(value, dict) and "record" in value:
        value = {k: v for k, v in value.items() if v is not None}
    if isinstance(value, dict) and value and ("record" not in value):
        items = [f"{inner}{json.dumps(k)}: {_pretty(v, inner)}" for k, v in sorted(value.items())]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        return "[\n" + ",\n".join(inner + _pretty(item, inner) for item in value) + f"\n{indent}]"
    return json.dumps(value, sort_keys=True, allow_nan=False)


def load_baseline(path: str | Path) -> Baseline:
    """The baseline in ``path``. Raises ``InputError`` when it is missing, truncated, of a newer version or has unknown keys."""
    name = f"baseline {str(path)!r}"
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; 'zerocast check --update --baseline FILE' makes one") from None
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{name} is damaged or truncated, it is not JSON: {error}") from None
    if not isinstance(data, dict) or "zerocast_baseline" not in data:
        raise InputError(f"{name} is no baseline; allowed: a file that 'zerocast check --update' wrote")
    version = data.pop("zerocast_baseline")
    if type(version) is not int or version < 1:
        raise InputError(f"{name} has version {version!r}; allowed: {VERSION}")
    if version > VERSION:
        raise InputError(f"{name} is of version {version}, written by a newer Zerocast; allowed: at most {VERSION}")
    baseline: Baseline = _build(Baseline, data, name)
    for place in baseline.environments:
        if set(place.environment) != set(ENVIRONMENT):
            raise InputError(
                f"{name}, environment has the keys {', '.join(sorted(place.environment))}; allowed: {', '.join(ENVIRONMENT)}"
            )
    return baseline


def _build(cls: Any, data: Any, where: str) -> Any:
    """Dataclass ``cls`` from JSON ``data`` with every key and type checked."""
    if not isinstance(data, dict):
        raise InputError(f"{where} is a {type(data).__name__}; allowed: a table")
    hints = get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise unknown_choice(f"{where}, key", key, hints)
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in data:
            raise InputError(f"{where} has no key {f.name!r}")
    return cls(**{key: _value(hints[key], value, f"{where}, {key}") for key, value in data.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise unknown_choice(where, value, get_args(hint))
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where} is {value!r:.60}; allowed: a list")
        return tuple(_build(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(hint) is dict:
        inner = get_args(hint)[1]
        if not isinstance(value, dict):
            raise InputError(f"{where} is {value!r:.60}; allowed: a table")
        return {key: item if inner is Any else _value(inner, item, f"{where}.{key}") for key, item in value.items()}
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    fine = type(value) in kinds or (type(value) is int and float in kinds)
    if not fine or (type(value) in (int, float) and not 0 <= value < float("inf")):
        allowed = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        raise InputError(f"{where} is {value!r:.60}; allowed: {allowed}, numbers not below 0")
    return value
