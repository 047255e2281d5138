"""``zerocast demo``."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zerocast.job_flags import json_flag, store_flag

if TYPE_CHECKING:
    from estimator.job import Gpu
    from estimator.report import StepReport
    from estimator.time.profile import HardwareProfile
    from validator.compare import Compared
    from validator.measure.case import Case

FORECAST = {"model": "llama-3-8b", "gpu": "h100-sxm", "gpus": 8, "seq_len": 4096, "recompute": "selective"}
TRAINED = {"model": "gpt-30m", "seq_len": 128, "micro_batch": 2, "dtype": "fp32"}
STAGES = (0, 1, 2, 3)
N_PROCESSES = 2
CALIBRATION_S = 40.0
STEPS, WARMUP = 5, 2


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the model is trained on here."""

    backend: str
    n_processes: int
    gpu: Gpu | None
    """``None``: the CPU."""

    @property
    def name(self) -> str:
        return self.gpu.name if self.gpu else "cpu"


@click.command(
    "demo",
    short_help="Forecast, train and measure a small model here, and compare (minutes).",
    epilog="Example: zerocast demo --store demo.db",
)
@click.option("--fresh", is_flag=True, help="Calibrate again although a profile is there.")
@store_flag
@json_flag
def command(fresh: bool, store_path: Path | None, as_json: bool) -> None:
    """Walk the whole road: a forecast for 8 x H100, then a 30M-parameter GPT really trained on this machine under ZeRO 0-3,
    with the forecast beside what was measured.

    Takes under three minutes on two cores. Records go to --store (default: demo/records.db in the user's folder).
    """
    from estimator.predict import predict
    from validator.compare import compare_records
    from validator.store.database import default_path

    started = time.perf_counter()
    store = store_path or default_path().parent / "demo" / "records.db"
    tell = Teller(silent=as_json)

    tell.head("1/4  Forecast: Llama-3-8B on 8 x H100, every ZeRO stage and offload")
    forecasts = forecast_grid()
    tell.strategies(forecasts)

    device = this_device()
    tell.head(f"2/4  Calibrate this machine ({device.name})")
    profile = calibrated(device, store, fresh, tell)

    tell.head(f"3/4  Train {TRAINED['model']} here under ZeRO 0-3 with {device.n_processes} processes")
    measured = []
    for case in cases(device, profile):
        forecast = predict(case.job, profile)
        tell.line(f"ZeRO-{case.job.strategy.zero_stage}: forecast {tell.step(forecast)} ...")
        measured.append(train(case, store))
        tell.line(f"        measured {tell.step(measured[-1])}")

    tell.head("4/4  Predicted beside measured")
    result = compare_records(measured, [profile])
    tell.compared(result, measured)
    tell.line(f"done in {time.perf_counter() - started:.0f} s; open the dashboard on these records with")
    tell.line(f"\n    {program()} dashboard --store {shlex.quote(str(store))}\n")
    if as_json:
        from zerocast.show import write_json

        write_json(
            {
                "forecast": [report.to_dict() for report in forecasts],
                "measured": [report.to_dict() for report in measured],
                "predicted": [report.to_dict() for report in result.predicted.values()],
                "comparison": result.comparison.to_dict(),
                "store": str(store),
            }
        )


def forecast_grid() -> list[StepReport]:
    """The example job under every stage and offload."""
    from estimator.job.options import JobOptions, build_job
    from estimator.plan import alternatives

    return alternatives(build_job(JobOptions(**FORECAST)))  # type: ignore[arg-type]


def this_device() -> Device:
    """Two GPUs where there are two that the catalogue knows, else the CPU."""
    import torch

    from estimator import catalog
    from validator.devices import catalogue_name

    if torch.cuda.is_available() and torch.cuda.device_count() >= N_PROCESSES:
        name = catalogue_name(torch.cuda.get_device_name())
        if name:
            return Device(backend="cuda", n_processes=N_PROCESSES, gpu=catalog.gpu(name))
    return Device(backend="cpu", n_processes=N_PROCESSES, gpu=None)


def calibrated(device: Device, store: Path, fresh: bool, tell: Teller) -> HardwareProfile:
    """The profile beside the demo's store, measured now when there is none (or ``fresh``)."""
    from dashboard.profiles import profile_of, profiles_beside, profiles_folder
    from zerocast.commands.calibrate import run_calibration

    profile = None if fresh else profile_of(device.name, profiles_beside(store))
    if profile is not None:
        tell.line(f"profile of {profile.date} reused (--fresh measures again)")
    else:
        path = profiles_folder(store) / f"{device.name}.json"
        kind: dict[str, Any] = (
            {"device": "cuda", "gpu": device.gpu}
            if device.gpu
            else {"device": "cpu", "workers": (1, device.n_processes)}
        )
        profile = run_calibration(path, budget_s=CALIBRATION_S, effort="quick", dtypes=(TRAINED["dtype"],), **kind)
    tell.profile(profile)
    return profile


def cases(device: Device, profile: HardwareProfile) -> list[Case]:
    """The small model under every stage on ``device``."""
    from estimator.job.options import JobOptions, build_job
    from validator.measure.case import Case

    here: dict[str, Any] = {} if device.gpu else {"local_gpu": profile.gpu, "local_host": profile.host}
    found = []
    for stage in STAGES:
        options = JobOptions(gpu=device.name, gpus=device.n_processes, zero=stage, **TRAINED)  # type: ignore[arg-type]
        job = build_job(options, **here)
        found.append(Case(job=job, backend=device.backend, steps=STEPS, warmup=WARMUP, time_limit_s=300.0))  # type: ignore[arg-type]
    return found


def train(case: Case, store: Path) -> StepReport:
    """Measures ``case`` into ``store``."""
    from zerocast.commands.measure import run_case

    return run_case(case, store)


def program() -> str:
    """The command as the user called it."""
    name = Path(sys.argv[0])
    return shlex.quote(sys.argv[0]) if name.name == "zerocast" and "/" in sys.argv[0] else "zerocast"


class Teller:
    """Says what happens, or nothing at all."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent

    def line(self, text: str) -> None:
        from zerocast.show import say

        if not self.silent:
            say(text)
            sys.stdout.flush()

    def head(self, text: str) -> None:
        self.line(f"\n=== {text}")

    def strategies(self, reports: Sequence[StepReport]) -> None:
        from zerocast.show import show_strategies

        if not self.silent:
            show_strategies("", reports)

    def profile(self, profile: HardwareProfile) -> None:
        from zerocast.commands.calibrate import show_profile

        if not self.silent:
            show_profile(profile)

    def step(self, report: StepReport) -> str:
        from zerocast.show import bytes_cell, seconds_cell

        return f"{seconds_cell(report.step_s)} a step, peak {bytes_cell(report.peak_allocated_bytes)}"

    def compared(self, result: Compared, measured: Sequence[StepReport]) -> None:
        from dashboard.data import compared_rows
        from zerocast.show import show_side_by_side

        if self.silent:
            return
        columns = {r.job_key: f"ZeRO-{r.job['strategy']['zero_stage']}" for r in measured}
        rows = compared_rows(result.comparison.rows)
        groups = {
            "Totals": ("peak_allocated_bytes", "step_s", "tokens_per_s"),
            "Memory of one process, each category at its own peak": ("category_peak_bytes",),
            "Time of one step": ("time_parts_s",),
            "Bytes on the wire": ("collective_bytes",),
        }
        for title, fields in groups.items():
            show_side_by_side(title, [r for r in rows if r["term"].partition(".")[0] in fields], columns)
        for key, reason in result.refused.items():
            self.line(f"no forecast for {columns[key]}: {reason}")
