"""Which GPU this machine has, and its name in the catalogue."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from estimator import catalog
from estimator.errors import InputError, unknown_choice
from validator.suites import LeftOut, Plan


def device_here() -> str | None:
    """What CUDA calls this machine's first GPU; ``None`` when torch can use none.

    Asked in a process of its own, because a CUDA context in this one would take memory from what is measured.
    """
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise InputError(f"torch cannot be asked for its GPU: {(done.stderr.strip() or 'it crashed').splitlines()[-1]}")
    return done.stdout.strip() or None


def gpu_name(device: str | None, chosen: str | None) -> str | None:
    """Catalogue name of the GPU that CUDA calls ``device``, or the one that the user has ``chosen``.

    Raises ``InputError`` when the two differ, or when nothing is chosen and the catalogue does not know ``device``.
    """
    named = catalog.gpu(chosen).name if chosen else None
    found = catalogue_name(device) if device else None
    if device and found is None and named is None:
        raise unknown_choice("the GPU of this machine", device, catalog.gpu_names())
    if found and named and found != named:
        raise InputError(f"gpu is {chosen!r}; allowed: {found!r}, which is the GPU of this machine")
    return found or named


def catalogue_name(device: str) -> str | None:
    """The catalogue's name for what CUDA calls ``device`` (``"NVIDIA H100 80GB HBM3"``); ``None`` when it has none."""
    words = device.lower().replace("-", " ").split()
    spelled = "-".join(w for w in words if w not in ("nvidia", "amd", "tesla", "instinct") and not w.startswith("hbm"))
    try:
        return catalog.gpu(spelled).name
    except InputError:
        return None


def needs_gpu(settings: Mapping[str, Any]) -> bool:
    """Whether a suite's combination runs on this machine's GPU or is about it."""
    return settings.get("gpu") == "here" or str(settings.get("backend")).startswith("cuda")


def without_gpu(plan: Plan) -> Plan:
    """``plan`` on a machine without a GPU that torch can use: what needs one is left out."""
    reason = "it needs a GPU, and torch can use none here"
    cases = [case for case in plan.cases if not case.on_cuda]
    boundaries = [boundary for boundary in plan.boundaries if not boundary.case_at(1).on_cuda]
    n_dropped = len(plan.cases) - len(cases) + len(plan.boundaries) - len(boundaries)
    dropped = [LeftOut(settings={}, reason=reason)] * n_dropped
    return replace(plan, cases=tuple(cases), boundaries=tuple(boundaries), left_out=(*plan.left_out, *dropped))


def check_devices(plan: Plan, here: str | None) -> None:
    """Raises ``InputError`` when a case of ``plan`` needs a GPU and it is not the one of this machine."""
    for case in (*plan.cases, *(boundary.case_at(1) for boundary in plan.boundaries)):
        gpu = case.job.cluster.gpu.name
        if case.on_cuda and here is None:
            raise InputError(
                f"suite {plan.suite!r} runs on backend {case.backend!r}, and this machine has no GPU that torch can use; "
                "allowed without one: suites of the backends fake and cpu"
            )
        if case.on_cuda and gpu != here:
            raise InputError(f"suite {plan.suite!r} has gpu {gpu!r}; allowed with {case.backend!r}: {here!r} or 'here'")
