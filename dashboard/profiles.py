"""Calibrated profiles beside a record store, and which of them describes a machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from validator.compare import profile_of as profile_of
from validator.store.database import default_path

if TYPE_CHECKING:
    from estimator.time.profile import HardwareProfile


def profiles_folder(store_path: Path | None) -> Path:
    """Where ``calibrate`` puts profiles: a folder beside the store."""
    return (store_path or default_path()).parent / "profiles"


def profiles_beside(store_path: Path | None) -> list[HardwareProfile]:
    """The calibrated profiles beside the store, newest last. Raises ``InputError`` when one is damaged."""
    from estimator.time.profile_file import load_profile

    files = sorted(profiles_folder(store_path).glob("*.json"), key=lambda path: path.stat().st_mtime)
    return [load_profile(path) for path in files]


def local_machine(profiles: Iterable[HardwareProfile]) -> HardwareProfile | None:
    """The last of ``profiles`` that describes a whole machine: what the GPU name ``cpu`` means."""
    return next((p for p in reversed(list(profiles)) if p.gpu is not None and p.host is not None), None)
