"""Measures the machine it runs on and writes what it reaches as a ``HardwareProfile``."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from estimator.errors import InputError, require_choice
from estimator.job.cluster import Gpu
from estimator.time.profile import HardwareProfile
from estimator.time.profile_file import save_profile, write_json
from validator.calibrate.build import build_profile
from validator.calibrate.tasks import DTYPES, Device, Effort, Task, tasks_for
from validator.calibrate.worker import run
from validator.case import available_cores

__all__ = ["calibrate"]

Progress = Callable[[str, int, int], None]
"""Called with what was just measured, points done and points planned."""

_PARTIAL_FORMAT = "zerocast-calibration-partial"
_SAVE_EVERY_S = 2.0


def calibrate(
    device: Device = "cpu",
    budget_s: float = 45.0,
    out: str | Path | None = None,
    on_progress: Progress | None = None,
    *,
    workers: tuple[int, ...] | None = None,
    dtypes: tuple[str, ...] = ("fp32", "bf16"),
    effort: Effort = "full",
    gpu: Gpu | None = None,
) -> HardwareProfile:
    """Measure this machine for about ``budget_s`` seconds (start-up of the processes comes on top, and the few
    indispensable points are always taken) and return its profile; write it to ``out`` if given.

    ``workers``: how many processes run at once, one round each (default 1, 2 and 4 on a CPU, 1 on a GPU); a forecast
    for N ranks on one machine uses the round nearest to N. ``gpu``: the catalogue's description of a CUDA device
    (``None`` for a CPU). With ``out``, points are saved to ``<out>.partial`` as they come: an interrupted
    calibration goes on from there. Raises ``InputError`` for bad arguments or a device that is not there.
    """
    require_choice("device", device, ("cpu", "cuda"))
    require_choice("effort", effort, ("full", "quick"))
    for dtype in dtypes:
        require_choice("dtype", dtype, DTYPES)
    if not budget_s > 0:
        raise InputError(f"budget_s is {budget_s!r}; allowed: a number > 0")
    if device == "cuda":
        _require_cuda(gpu)
    counts = tuple(sorted(set(workers or ((1, 2, 4) if device == "cpu" else (1,)))))
    if counts[0] < 1 or (device == "cuda" and counts != (1,)):
        raise InputError(f"workers is {workers!r}; allowed: numbers >= 1, and only 1 on a GPU")
    cores = available_cores()
    rounds = {n: tasks_for(device, n, dtypes, effort) for n in counts}
    notes = _busy(cores)
    partial = _Partial(out, {"device": device, "cores": cores})
    planned = sum(len(tasks) for tasks in rounds.values())
    for n in counts:
        todo = [t for t in rounds[n] if t.key(n) not in partial.done]
        _measure_round(todo, n, max(1, cores // n), device, budget_s / len(counts), partial, on_progress, planned)
    profile = build_profile(partial.done, cores, gpu, notes)
    if out is not None:
        save_profile(profile, out)
        partial.remove()
    return profile


def _busy(cores: int) -> tuple[str, ...]:
    """A note when others keep the machine busy: medians cannot undo that."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= 0.5 * cores:
        return ()
    return (f"the machine was busy when it was calibrated (load {load:.1f} on {cores} cores): rates may be too low",)


def _require_cuda(gpu: Gpu | None) -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError("device is 'cuda', but torch sees no GPU on this machine; allowed: cpu")
    if gpu is None:
        raise InputError("gpu is None; allowed with device 'cuda': the catalogue's description of the GPU")


class _Partial:
    """Results so far, by task key; kept beside the final file so that an interrupted run can go on."""

    def __init__(self, out: str | Path | None, machine: dict[str, Any]) -> None:
        self.path = None if out is None else Path(f"{out}.partial")
        self.machine = machine
        self.done: dict[str, dict[str, Any]] = {}
        self._saved_at = time.perf_counter()
        if self.path is not None and self.path.exists():
            try:
                data = json.loads(self.path.read_text(encoding="utf-8"))
                if data["format"] == _PARTIAL_FORMAT and data["machine"] == machine:
                    self.done = dict(data["done"])
            except (OSError, ValueError, KeyError, TypeError):
                raise InputError(
                    f"{str(self.path)!r} is not a calibration in progress; delete it to start afresh"
                ) from None

    def add(self, key: str, result: dict[str, Any]) -> None:
        self.done[key] = result
        if time.perf_counter() - self._saved_at > _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        if self.path is not None and self.done:
            write_json({"format": _PARTIAL_FORMAT, "machine": self.machine, "done": self.done}, self.path)
            self._saved_at = time.perf_counter()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _measure_round(
    tasks: list[Task], workers: int, threads: int, device: str, budget_s: float, partial: _Partial,
    on_progress: Progress | None, planned: int,
) -> None:  # fmt: skip
    """Run ``tasks`` in ``workers`` fresh processes at once. Whatever happens, points so far are saved and processes end."""
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="zerocast-calibrate-") as folder:
        arguments = (workers, threads, device, f"{folder}/rendezvous", tasks, budget_s, results)
        processes = [context.Process(target=run, args=(rank, *arguments), daemon=True) for rank in range(workers)]
        try:
            for process in processes:
                process.start()
            while True:
                try:
                    message = results.get(timeout=0.5)
                except queue.Empty:
                    dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
                    if dead:
                        raise RuntimeError(f"a calibration process ended with exit code {dead[0]}") from None
                    continue
                if message is None:
                    break
                partial.add(*message)
                if on_progress is not None:
                    on_progress(_label(message[0]), len(partial.done), planned)
            for process in processes:
                process.join(timeout=30)
        finally:
            partial.save()
            for process in processes:
                if process.is_alive():
                    process.terminate()
                    process.join(timeout=10)


def _label(key: str) -> str:
    workers, kind, name, dtype, sizes, *_ = json.loads(key)
    size = "x".join(str(s) for s in sizes)
    return " ".join(x for x in (kind, name if name != kind else "", size, dtype, f"({workers} at once)") if x)
