"""Measures the machine it runs on and writes what it reaches as a ``HardwareProfile``."""

from __future__ import annotations

import multiprocessing
import os
import platform
import queue
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from estimator.errors import InputError, require_choice
from estimator.job.cluster import Gpu
from estimator.time.profile import HardwareProfile
from estimator.time.profile_file import save_profile
from validator import provenance
from validator.calibrate.build import build_profile, left_out
from validator.calibrate.describe import describe
from validator.calibrate.nccl_tests import import_nccl_tests, read_nccl_tests, require_same_gpu, with_nccl_tests
from validator.calibrate.partial import Partial
from validator.calibrate.tasks import DEFAULT_DTYPES, DTYPES, Device, Effort, task_of, tasks_for
from validator.calibrate.worker import CONTEXT_LOST, Round, run
from validator.measure.case import available_cores

__all__ = ["DEFAULT_BUDGET_S", "calibrate", "describe", "import_nccl_tests"]

Progress = Callable[[str, int, int], None]
"""Called with what was just measured, points done and points planned."""

DEFAULT_BUDGET_S = {"cpu": 90.0, "cuda": 240.0}
_ALONE_SHARE = 0.75
"""Of a GPU's budget, where other rounds measure collectives over several."""
_RESTARTS = 5


def calibrate(
    device: Device = "cpu",
    budget_s: float | None = None,
    out: str | Path | None = None,
    on_progress: Progress | None = None,
    *,
    workers: tuple[int, ...] | None = None,
    dtypes: tuple[str, ...] | None = None,
    effort: Effort = "full",
    gpu: Gpu | None = None,
    nvme: str | Path | None = None,
    nccl_tests: tuple[str | Path, ...] = (),
) -> HardwareProfile:
    """Measure this machine for about ``budget_s`` seconds, the start of processes included unless it takes more than
    half of them (the few indispensable points are always taken), and return its profile; write it to ``out`` if given.

    ``budget_s``: default ``DEFAULT_BUDGET_S``. ``workers``: how many processes run at once, one round each; a forecast
    for N ranks on one machine uses the round nearest to N. Default on a CPU 1, 2 and 4; on GPUs 1 and, for
    collectives, powers of two up to all GPUs. ``gpu``: the catalogue's description of a CUDA device (``None`` for a
    CPU). ``nvme``: a folder in which files are read and written; without one they are not measured. ``nccl_tests``:
    files of nccl-tests output whose collectives go into the profile.

    With ``out``, points are saved to ``<out>.partial`` as they come: an interrupted calibration goes on from there.
    A point that cannot be measured is left out, and ``HardwareProfile.skipped`` says why. Raises ``InputError`` for bad
    arguments or a device that is not there.
    """
    require_choice("device", device, ("cpu", "cuda"))
    require_choice("effort", effort, ("full", "quick"))
    dtypes = dtypes or DEFAULT_DTYPES[device]
    for dtype in dtypes:
        require_choice("dtype", dtype, DTYPES)
    budget_s = DEFAULT_BUDGET_S[device] if budget_s is None else budget_s
    if not budget_s > 0:
        raise InputError(f"budget_s is {budget_s!r}; allowed: a number > 0")
    folder = None if nvme is None else _folder(nvme)
    n_gpus = _require_cuda(gpu) if device == "cuda" else 0
    imported = read_nccl_tests(nccl_tests) if nccl_tests else None
    if imported is not None:
        require_same_gpu(imported, gpu.name if gpu else "cpu")
    counts = _counts(workers, n_gpus)
    cores = available_cores()
    training = (1, max((n for n in counts if n <= max(2, cores)), default=1))
    rounds = {
        n: tasks_for(device, n, dtypes, effort, cores=cores, files=folder is not None, steps=n in training)
        for n in counts
    }
    off = _kernels_off() if device == "cuda" else ""
    partial = Partial(out, _machine(device, cores, gpu, folder) | ({"kernels off": off} if off else {}))
    notes = (*_busy(cores), *partial.notes)
    if off:
        notes += (f"kernels were switched off, plain torch was measured in their place: {off}",)
    planned = {task.key(n): task for n, tasks in rounds.items() for task in tasks}

    def tell(key: str) -> None:
        if on_progress is not None:
            n, task = task_of(key)
            on_progress(task.label(n), len(partial.done), max(len(planned), len(partial.done)))

    start = time.monotonic()
    before = 0.0
    for n, share in _shares(counts, n_gpus).items():
        todo = [t for t in rounds[n] if t.key(n) not in partial.done]
        at_least_s = (share - before) * budget_s / 2
        this = Round(n, max(1, cores // n), device, "", todo, start + share * budget_s, at_least_s, folder, gpu)
        _measure_round(this, partial, tell)
        before = share
    skipped = left_out(list(planned), partial.done, budget_s, device, n_gpus, folder is not None)
    from validator.calibrate.steps import with_steps  # which takes its time to load

    profile = with_steps(build_profile(partial.done, cores, gpu, notes, skipped), partial.done)
    if imported is not None:
        profile = with_nccl_tests(profile, imported)
    if out is not None:
        save_profile(profile, out)
        partial.remove()
    return profile


def _counts(workers: tuple[int, ...] | None, n_gpus: int) -> tuple[int, ...]:
    """Workers of each round, in order."""
    usual = tuple(n for n in (1, 2, 4, 8, 16, n_gpus) if n <= max(1, n_gpus)) if n_gpus else (1, 2, 4)
    counts = tuple(sorted(set(workers or usual)))
    if counts[0] < 1 or (n_gpus and (counts[0] != 1 or counts[-1] > n_gpus)):
        allowed = f"1 and up to {n_gpus}, the number of GPUs" if n_gpus else "numbers >= 1"
        raise InputError(f"workers is {workers!r}; allowed: {allowed}")
    return counts


def _shares(counts: tuple[int, ...], n_gpus: int) -> dict[int, float]:
    """By when, in shares of the budget, each round is to end."""
    if n_gpus and len(counts) > 1:
        others = (1 - _ALONE_SHARE) / (len(counts) - 1)
        return {n: _ALONE_SHARE + i * others for i, n in enumerate(counts)}
    return {n: (i + 1) / len(counts) for i, n in enumerate(counts)}


def _machine(device: str, cores: int, gpu: Gpu | None, folder: Path | None) -> dict[str, Any]:
    """What points must have in common to stand in one profile."""
    return {
        "device": device,
        "cores": cores,
        "gpu": gpu.name if gpu else "",
        "torch": provenance.package_version("torch"),
        "host": platform.node(),
        "folder": str(folder or ""),
    }


def _folder(nvme: str | Path) -> Path:
    """Checked where torch may be loaded: without the flag this process does without it."""
    from validator.calibrate.files import require_folder

    return require_folder(nvme)


def _kernels_off() -> str:
    """Names of the runtime's kernels that the environment switches off."""
    from runtime.kernels import registry

    return ", ".join(name for name in registry.KERNELS if not registry.enabled(name))


def _busy(cores: int) -> tuple[str, ...]:
    """A note when others keep the machine busy: medians cannot undo that."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load <= 0.5 * cores:
        return ()
    return (f"the machine was busy when it was calibrated (load {load:.1f} on {cores} cores): rates may be too low",)


def _require_cuda(gpu: Gpu | None) -> int:
    """Number of GPUs."""
    import torch

    if not torch.cuda.is_available():
        raise InputError("device is 'cuda', but torch sees no GPU on this machine; allowed: cpu")
    if gpu is None:
        raise InputError("gpu is None; allowed with device 'cuda': the catalogue's description of the GPU")
    return torch.cuda.device_count()


def _measure_round(this: Round, partial: Partial, tell: Callable[[str], None]) -> None:
    """Measure ``this`` round. A task that ends its process is left out, and the rest goes on in new ones."""
    restarts = 0
    while this.tasks:
        code = _run_processes(this, partial, tell)
        if code is None:
            return
        left = [t for t in this.tasks if t.key(this.workers) not in partial.done]
        lost_by_itself = code == CONTEXT_LOST and len(left) < len(this.tasks)
        if left and not lost_by_itself:  # tasks run in order: this one was under way
            key = left[0].key(this.workers)
            partial.add(key, {"skipped": f"its process ended with exit code {code}"})
            tell(key)
        restarts += 1
        if restarts > _RESTARTS:
            raise RuntimeError(f"calibration processes ended {restarts} times, the last with exit code {code}")
        this = this._replace(tasks=[t for t in left if t.key(this.workers) not in partial.done])


def _run_processes(this: Round, partial: Partial, tell: Callable[[str], None]) -> int | None:
    """Run the round's tasks in fresh processes at once; the exit code of one that died, or ``None``.

    Whatever happens, points so far are saved and processes end.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory(prefix="zerocast-calibrate-") as rendezvous:
        this = this._replace(rendezvous=f"{rendezvous}/rendezvous")
        processes = [
            context.Process(target=run, args=(rank, this, results), daemon=True) for rank in range(this.workers)
        ]
        try:
            for process in processes:
                process.start()
            while True:
                try:
                    message = results.get(timeout=0.5)
                except queue.Empty:
                    dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
                    if dead:
                        return dead[0]
                    continue
                if message is None:
                    break
                partial.add(*message)
                tell(message[0])
            for process in processes:
                process.join(timeout=30)
            return None
        finally:
            partial.save()
            for process in processes:
                if process.is_alive():
                    process.terminate()
                    process.join(timeout=10)
                if process.is_alive():
                    process.kill()
