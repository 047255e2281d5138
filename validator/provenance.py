"""Where a measurement comes from: versions, machine, date, commit and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from validator.measure.case import available_cores

TREE = Path(__file__).resolve().parent.parent
"""The source tree that runs: what processes of ours import from."""


def collect(*, with_torch: bool = False) -> dict[str, Any]:
    """Provenance of this process as plain JSON data; what cannot be found out is ``None``, never guessed.

    ``with_torch`` imports torch and adds what only it knows: its build, CUDA, NCCL and the GPU.
    """
    data: dict[str, Any] = {
        "date_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node() or None,
        "os": platform.platform(),
        "cpu": cpu_model(),
        "cores": available_cores(),
        "memory_bytes": host_memory_bytes(),
        "python": platform.python_version(),
        "numpy": package_version("numpy"),
        "cupy": cupy_version(),
        "git": git_state(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
    return {**data, **torch_facts()} if with_torch else {**data, "torch": package_version("torch")}


def package_version(name: str) -> str | None:
    """Version of an installed distribution, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cupy_version() -> str | None:
    """CuPy's version under any of its distribution names."""
    return next((v for name in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if (v := package_version(name))), None)


def torch_facts() -> dict[str, Any]:
    """torch's version and threads; with a GPU also CUDA, NCCL, the GPU, its driver and clocks."""
    import torch

    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "nccl": None,
        "gpu": None,
    }
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        properties = torch.cuda.get_device_properties(device)
        facts["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
        facts["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "n_sms": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            **nvidia_smi(str(getattr(properties, "uuid", device))),
        }
    return facts


def nvidia_smi(gpu: str) -> dict[str, str]:
    """Driver version, clocks and power limit of one GPU (index or UUID); empty without ``nvidia-smi``."""
    names = (
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "power.limit",
        "compute_mode",
        "mig.mode.current",
    )
    if shutil.which("nvidia-smi") is None:
        return {}
    if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", gpu):
        gpu = f"GPU-{gpu}"
    text = _output(["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "-i", gpu])
    values = [value.strip() for value in (text or "").split("\n")[0].split(",")]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def cpu_model() -> str | None:
    """The processor's name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine() or None


def host_memory_bytes() -> int | None:
    """Memory of this machine; a container's limit when that is smaller."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = _read_int(limit_file)
        if limit is not None:
            total = min(total, limit)
    return total


def available_memory_bytes() -> int | None:
    """Memory that new processes can use now without swapping; within a container's limit."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return host_memory_bytes()
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    free = int(found.group(1)) * 1024 if found else None
    total = host_memory_bytes()
    return min(free, total) if free is not None and total is not None else free or total


def git_state(tree: Path = TREE) -> dict[str, Any] | None:
    """Commit of the source tree and whether it differs from it; ``None`` when it is not a git checkout."""
    if shutil.which("git") is None or not (tree / ".git").exists():
        return None
    commit = _output(["git", "-C", str(tree), "rev-parse", "--verify", "HEAD"])
    status = _output(["git", "-C", str(tree), "status", "--porcelain"])
    return {"commit": commit or None, "dirty": bool(status) if status is not None else None}


def _output(command: list[str]) -> str | None:
    """What ``command`` prints, or ``None`` when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
