"""Files read and written directly (O_DIRECT), past the page cache, where the file system takes it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch
from torch import Tensor

from estimator.schedule.nvme import FILE_ALIGNMENT_BYTES

IN_MEMORY = ("tmpfs", "ramfs")
"""File systems that are memory, not a disk."""


def file_system(folder: Path) -> str:
    """Kind of file system that ``folder`` is on, ``"ext4"`` for example; ``"unknown"`` where it cannot be told."""
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    real = folder.resolve()
    best, kind = -1, "unknown"
    for line in lines:
        _, mounted, name, *_ = line.split(" ")
        place = Path(mounted.replace("\\040", " "))
        if real.is_relative_to(place) and len(place.parts) >= best:
            best, kind = len(place.parts), name
    return kind


def open_direct(path: Path, flags: int = 0) -> int:
    """Descriptor of ``path`` for direct reading and writing. Raises ``OSError`` where that is not possible."""
    if not hasattr(os, "O_DIRECT"):
        raise OSError(errno.ENOTSUP, "this operating system has no O_DIRECT")
    return os.open(path, os.O_RDWR | os.O_DIRECT | flags, 0o600)


def aligned_bytes(n_bytes: int, *, pinned: bool = False) -> Tensor:
    """``n_bytes`` of host memory, uint8, uninitialised, at an address that direct access takes."""
    raw = torch.empty(n_bytes + FILE_ALIGNMENT_BYTES, dtype=torch.uint8, pin_memory=pinned)
    start = -raw.data_ptr() % FILE_ALIGNMENT_BYTES
    return raw[start : start + n_bytes]
