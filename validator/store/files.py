"""Record files as they lie in ``validator/records/``: JSON lines, each file with the profile of the machine beside it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.report import StepReport
from estimator.time.profile import HardwareProfile
from estimator.time.profile_file import load_profile, save_profile
from validator.devices import catalogue_name
from validator.kernels.files import KERNELS_ENDING, export_kernels, import_kernels, kernel_files
from validator.store.records import export_reports, import_reports

__all__ = [
    "KERNELS_ENDING", "PROFILE_ENDING", "RecordFile", "has_step_records", "profile_path_of", "publish",
    "read_record_files",
]  # fmt: skip

PROFILE_ENDING = ".profile.json"
_NO_REPORTS = ("failures.jsonl",)
"""Written by a campaign beside its records."""


@dataclass(frozen=True, kw_only=True)
class RecordFile:
    """One file of measured steps."""

    path: Path
    reports: tuple[StepReport, ...]
    """Measured ones, in the file's order."""
    profile: HardwareProfile | None
    """From ``<name>.profile.json`` beside it: the calibration that forecasts for this machine use."""


def read_record_files(path: str | Path) -> tuple[list[RecordFile], list[Path]]:
    """The record file at ``path``, or every ``*.jsonl`` of the folder ``path`` by name; and the files left out.

    Left out are files of kernel records and a campaign's failures. Raises ``InputError`` when a file cannot be read, or
    when nothing is left.
    """
    place = Path(path)
    candidates = sorted(place.glob("*.jsonl")) if place.is_dir() else [place]
    left_out = [p for p in candidates if p in kernel_files(place) or p.name in _NO_REPORTS]
    found = [_read(p) for p in candidates if p not in left_out]
    if not found:
        holds = f"only {', '.join(p.name for p in left_out)}" if left_out else "no such file"
        raise InputError(
            f"{str(path)!r} has no records of steps ({holds}); allowed: a *.jsonl file, or a folder of them"
        )
    return found, left_out


def has_step_records(path: str | Path) -> bool:
    """Whether ``path`` is, or holds, anything else than records of kernels."""
    place = Path(path)
    others = set(place.glob("*.jsonl")) if place.is_dir() else {place}
    return bool(others - set(kernel_files(place)) - {place / name for name in _NO_REPORTS})


def profile_path_of(path: Path) -> Path:
    """Where the profile of the record file ``path`` (of steps or kernels) lies."""
    ending = f".{KERNELS_ENDING}" if path.name.endswith(f".{KERNELS_ENDING}") else path.suffix
    return path.with_name(path.name.removesuffix(ending) + PROFILE_ENDING)


def _read(path: Path) -> RecordFile:
    reports = tuple(report for report in import_reports(path) if report.origin != "predicted")
    beside = profile_path_of(path)
    return RecordFile(path=path, reports=reports, profile=load_profile(beside) if beside.exists() else None)


def publish(sources: Sequence[str | Path], profile: str | Path | None, folder: str | Path) -> list[Path]:
    """Writes the records of ``sources`` (files, or campaigns' folders) for the public into ``folder``.

    Steps go to one file named after the GPU (or ``cpu``) and torch's version, numbered where the name is taken; kernels go
    to another, and a copy of ``profile`` is laid beside them. All get an alias for the host's name, and lose folders in
    commands and the kernel's build. Returns the paths written. Raises ``InputError`` when a file cannot be read or written
    or the records are of several kinds of machine.
    """
    chosen = [source for source in sources if has_step_records(source)]
    steps = [report for source in chosen for file in read_record_files(source)[0] for report in file.reports]
    kernels = [report for source in sources for path in kernel_files(Path(source)) for report in import_kernels(path)]
    origins = [*(report.provenance for report in steps), *(report.provenance for report in kernels)]
    names = sorted({_name_of(origin) for origin in origins})
    if len(names) != 1:
        raise InputError(
            f"the records are of {len(names)} kinds of machine ({', '.join(names)}); allowed: one at a time"
        )
    calibrated = load_profile(profile) if profile is not None else None
    target = _free_path(Path(folder), names[0])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder {str(folder)!r} cannot be made: {error.strerror or error}") from None
    written = []
    if steps:
        export_reports([replace(r, provenance=_anonymous(r.provenance)) for r in steps], target)
        written.append(target)
    if kernels:
        written.append(target.with_name(f"{target.stem}.{KERNELS_ENDING}"))
        export_kernels([replace(k, provenance=_anonymous(k.provenance)) for k in kernels], written[-1])
    if calibrated is not None:
        versions = {k: _system(v) if k == "os" else v for k, v in calibrated.versions.items()}
        calibrated = replace(calibrated, host_name=_alias(calibrated.host_name), versions=versions)
        written.append(save_profile(calibrated, profile_path_of(target)))
    return written


def _name_of(provenance: Mapping[str, Any]) -> str:
    gpu, torch = provenance.get("gpu"), provenance.get("torch")
    device = str(gpu.get("name") or "gpu") if isinstance(gpu, dict) else "cpu"
    device = catalogue_name(device) or re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{device}_torch{str(torch or 'unknown').partition('+')[0]}"


def _free_path(folder: Path, name: str) -> Path:
    """The file of steps under the first number that no file of ``folder`` has."""
    stems = (f"{name}_{n}" if n > 1 else name for n in range(1, 10_000))
    endings = (".jsonl", f".{KERNELS_ENDING}", PROFILE_ENDING)
    stem = next(s for s in stems if not any((folder / f"{s}{ending}").exists() for ending in endings))
    return folder / f"{stem}.jsonl"


def _anonymous(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """``provenance`` as ``publish`` writes it."""
    public = dict(provenance)
    if public.get("host"):
        public["host"] = _alias(str(public["host"]))
    if public.get("os"):
        public["os"] = _system(str(public["os"]))
    if isinstance(public.get("command"), list):
        public["command"] = [Path(str(word)).name if "/" in str(word) else word for word in public["command"]]
    return public


def _alias(host: str) -> str:
    """The same alias for the same host. It says which records are of one machine and no more, but hides a common name
    only from a reader who does not try it."""
    if not host or re.fullmatch(r"host-[0-9a-f]{8}", host):
        return host
    return f"host-{hashlib.sha256(host.encode()).hexdigest()[:8]}"


def _system(name: str) -> str:
    """The system with its version up to the first minor number: ``"Linux-6.1"`` of ``"Linux-6.1.0-22-amd64-..."``."""
    found = re.match(r"[A-Za-z]+-\d+\.\d+", name)
    return found.group(0) if found else name.partition("-")[0]
