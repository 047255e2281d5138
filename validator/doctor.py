"""What this machine has and lacks for forecasting, measuring and looking at results."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from estimator.errors import InputError
from estimator.units import GIB, format_bytes
from validator import provenance
from validator.gpu.run import run_checks
from validator.store.database import Store, default_path

LEAST_DISK_BYTES = 1 * GIB
LEAST_MEMORY_BYTES = 4 * GIB
Status = Literal["ok", "warn", "missing"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    what: str
    status: Status
    """``warn``: works, with a limit; ``missing``: what needs it does not work."""
    detail: str
    remedy: str = ""
    """What to do about it; empty when nothing is to be done."""


def diagnose(store_path: Path | None = None) -> list[Finding]:
    """Looks at Python, torch, CUDA, NCCL, CuPy, the GPUs, memory, disk, store, gloo, Streamlit and profiles.

    Changes nothing. A check that itself fails is a finding, not an exception.
    """
    path = store_path or default_path()
    torch, torch_finding = _torch()
    findings = [_python(), torch_finding]
    checks: list[Callable[[], Finding]] = [
        lambda: _gloo(torch), lambda: _cuda(torch), lambda: _nccl(torch), _cupy, lambda: _gpus(torch),
        _memory, lambda: _disk(path), lambda: _store(path), _streamlit, lambda: _profiles(path.parent),
    ]  # fmt: skip
    return findings + [check() for check in checks]


def examine_gpu() -> Iterator[Finding]:
    """What works on this machine's GPU, piece by piece, as it is found out; within about a minute.

    Allocates and computes there, in processes of its own. Without a GPU that torch can use: one finding that says so.
    """
    torch, _ = _torch()
    if torch is None or not torch.cuda.is_available():
        yield Finding(what="GPU checks", status="warn", detail="not run: torch can use no GPU here")
        return
    for name, works, sentence in run_checks():
        yield Finding(what=name, status="ok" if works else "missing", detail=sentence)


def _python() -> Finding:
    return Finding(what="Python", status="ok", detail=f"{platform.python_version()} at {sys.executable}")


def _torch() -> tuple[Any, Finding]:
    """torch itself, or ``None``, and the finding."""
    if importlib.util.find_spec("torch") is None:
        remedy = "pip install 'zerocast[runtime]' to train and measure; forecasts work without it"
        return None, Finding(what="torch", status="missing", detail="not installed", remedy=remedy)
    try:
        import torch
    except Exception as error:
        return None, Finding(what="torch", status="missing", detail=f"import fails: {error}", remedy="reinstall torch")
    return torch, Finding(what="torch", status="ok", detail=f"{torch.__version__}, {torch.get_num_threads()} threads")


def _gloo(torch: Any) -> Finding:
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        return Finding(
            what="gloo",
            status="missing",
            detail="no gloo in torch",
            remedy="install a torch build with gloo to measure on CPUs",
        )
    return Finding(what="gloo", status="ok", detail="several CPU processes can be measured")


def _cuda(torch: Any) -> Finding:
    if torch is not None and torch.cuda.is_available():
        return Finding(what="CUDA", status="ok", detail=f"{torch.version.cuda}")
    if torch is not None and torch.version.cuda is not None:
        return Finding(what="CUDA", status="warn", detail=f"torch is built for {torch.version.cuda} but sees no GPU or driver",
                       remedy="check nvidia-smi; CPU and fake measurements work without")  # fmt: skip
    return Finding(
        what="CUDA",
        status="warn",
        detail="torch has no CUDA",
        remedy="install a CUDA build of torch to measure on GPUs",
    )


def _nccl(torch: Any) -> Finding:
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return Finding(
            what="NCCL",
            status="warn",
            detail="not in this torch",
            remedy="install a CUDA build of torch to measure on GPUs",
        )
    if not torch.cuda.is_available():
        return Finding(what="NCCL", status="warn", detail="in torch, but there is no GPU to use it")
    return Finding(what="NCCL", status="ok", detail=".".join(str(part) for part in torch.cuda.nccl.version()))


def _cupy() -> Finding:
    version = provenance.cupy_version()
    if version is None:
        return Finding(
            what="CuPy",
            status="warn",
            detail="not installed",
            remedy="pip install 'zerocast[gpu]' on a machine with a GPU",
        )
    try:
        import cupy

        n_devices = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        detail = f"{version}, but it finds no GPU ({str(error).splitlines()[0]})"
        return Finding(what="CuPy", status="warn", detail=detail, remedy="check nvidia-smi; nothing on CPUs needs CuPy")
    return Finding(what="CuPy", status="ok", detail=f"{version}, {n_devices} GPU(s)")


def _gpus(torch: Any) -> Finding:
    if torch is None or not torch.cuda.is_available():
        return Finding(
            what="GPUs", status="warn", detail="none", remedy="measure with --backend fake or cpu on this machine"
        )
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return Finding(
        what="GPUs", status="ok", detail=", ".join(f"{p.name} ({format_bytes(p.total_memory)})" for p in names)
    )


def _memory() -> Finding:
    total, free = provenance.host_memory_bytes(), provenance.available_memory_bytes()
    if total is None or free is None:
        return Finding(what="host memory", status="warn", detail="cannot be read on this system")
    detail = f"{format_bytes(free)} free of {format_bytes(total)}, {provenance.available_cores()} cores ({provenance.cpu_model()})"
    if free < LEAST_MEMORY_BYTES:
        remedy = f"free some: measuring small models takes about {format_bytes(LEAST_MEMORY_BYTES)}"
        return Finding(what="host memory", status="warn", detail=detail, remedy=remedy)
    return Finding(what="host memory", status="ok", detail=detail)


def _disk(store_path: Path) -> Finding:
    folder = next(parent for parent in store_path.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    detail = f"{format_bytes(free)} free for {store_path.parent}"
    if free < LEAST_DISK_BYTES:
        return Finding(
            what="disk",
            status="warn",
            detail=detail,
            remedy="free some, or set ZEROCAST_HOME to a folder on another disk",
        )
    return Finding(what="disk", status="ok", detail=detail)


def _store(path: Path) -> Finding:
    if not path.exists():
        return Finding(what="store", status="ok", detail=f"{path} is made by the first measurement")
    try:
        return Finding(what="store", status="ok", detail=f"{path} holds {Store(path).count()} records")
    except InputError as error:
        return Finding(
            what="store",
            status="missing",
            detail=str(error),
            remedy="move the file away, or set ZEROCAST_HOME to another folder",
        )


def _streamlit() -> Finding:
    version = provenance.package_version("streamlit")
    if version is None:
        remedy = "pip install 'zerocast[dashboard]' to look at forecasts and runs in a browser"
        return Finding(what="Streamlit", status="missing", detail="not installed", remedy=remedy)
    return Finding(what="Streamlit", status="ok", detail=version)


def _profiles(home: Path) -> Finding:
    """Profiles that ``calibrate`` wrote beside the store."""
    found = sorted((home / "profiles").glob("*.json"))
    if not found:
        return Finding(what="profile", status="warn", detail=f"none in {home / 'profiles'}",
                       remedy="zerocast calibrate, so that forecasts for this machine use its own curves")  # fmt: skip
    return Finding(what="profile", status="ok", detail=", ".join(p.stem for p in found))
