"""The profile as a JSON file: unit-bearing keys, a format version, strict reading, atomic writing."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from estimator.errors import InputError, unknown_choice
from estimator.job.cluster import Gpu, Host
from estimator.time.profile import (
    AttentionPoint,
    BandwidthPoint,
    ChipModel,
    CollectivePoint,
    CopyPoint,
    FilePoint,
    HardwareProfile,
    HostPoint,
    LinkModel,
    MatmulPoint,
    OptimizerPoint,
    OverheadPoint,
    Reference,
    StackPoint,
    StepPoint,
)
from estimator.time.stack import RANGES

FORMAT = "zerocast-hardware-profile"
VERSION = 1

_POINTS: dict[str, Any] = {
    "matmul": MatmulPoint,
    "attention": AttentionPoint,
    "bandwidth": BandwidthPoint,
    "collectives": CollectivePoint,
    "copies": CopyPoint,
    "host_points": HostPoint,
    "optimizer_steps": OptimizerPoint,
    "files": FilePoint,
    "overheads": OverheadPoint,
    "steps": StepPoint,
    "stacks": StackPoint,
}
_PARTS: dict[str, Any] = {"gpu": Gpu, "host": Host, "reference": Reference, "chip": ChipModel, "link": LinkModel}
_ORIGINS = ("measured", "published", "default")


def profile_to_dict(profile: HardwareProfile) -> dict[str, Any]:
    """Plain data for JSON. Points are written without the fields that have their default value."""
    data: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    for f in fields(profile):
        value = getattr(profile, f.name)
        if f.name in _POINTS:
            defaults = _POINTS[f.name]._field_defaults
            data[f.name] = [
                {k: v for k, v in p._asdict().items() if k not in defaults or v != defaults[k]} for p in value
            ]
        elif f.name in _PARTS:
            data[f.name] = None if value is None else _plain(asdict(value))
        else:
            data[f.name] = _plain(value)
    return data


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def profile_from_dict(data: Any, where: str = "profile") -> HardwareProfile:
    """Inverse of ``profile_to_dict``. Raises ``InputError`` that begins with ``where`` for anything amiss."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise InputError(f"{where} is not a hardware profile: its format is not {FORMAT!r}")
    if data.get("version") != VERSION:
        raise InputError(f"{where} has profile version {data.get('version')!r}; allowed: {VERSION}; calibrate again")
    known = {f.name: f for f in fields(HardwareProfile)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key in ("format", "version"):
            continue
        if key not in known:
            raise unknown_choice(f"{where}: key", key, known)
        if key in _POINTS:
            if not isinstance(value, list):
                raise InputError(f"{where}: {key} is {type(value).__name__}; allowed: a list of points")
            values[key] = tuple(_point(_POINTS[key], p, f"{where}: {key}[{i}]") for i, p in enumerate(value))
        elif key in _PARTS:
            values[key] = None if value is None else _part(_PARTS[key], value, f"{where}: {key}")
        else:
            values[key] = _field(HardwareProfile, key, value, where)
    missing = [n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING and n not in values]
    if missing:
        raise InputError(f"{where} has no {missing[0]!r}")
    if values["origin"] not in _ORIGINS:
        raise unknown_choice(f"{where}: origin", values["origin"], _ORIGINS)
    for name in (name for point in values.get("stacks", ()) for name in point.constants):
        if name not in RANGES:
            raise unknown_choice(f"{where}: stacks: constant", name, RANGES)
    return HardwareProfile(**values)


class _Shape(NamedTuple):
    """What the JSON object of a kind of points holds."""

    kinds: dict[str, type | None]
    """By key: the type of its values, ``None`` where that is not a plain one."""
    required: tuple[str, ...]
    positive: tuple[str, ...]
    """Rates and seconds."""


@lru_cache(maxsize=len(_POINTS))
def _shape_of(cls: Any) -> _Shape:
    plain = {"float": float, "int": int, "str": str}
    kinds = {name: plain.get(_annotation(cls, name)) for name in cls._fields}
    required = tuple(name for name in cls._fields if name not in cls._field_defaults)
    return _Shape(
        kinds, required, tuple(n for n in cls._fields if n.endswith("_per_s") or n in ("seconds", "forecast_s"))
    )


def _point(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(f"{where} is {data!r}; allowed: an object with {', '.join(cls._fields)}")
    shape = _shape_of(cls)
    values = {k: v if type(v) is shape.kinds.get(k) else _field(cls, k, v, where) for k, v in data.items()}
    for name in shape.required:
        if name not in values:
            raise InputError(f"{where} has no {name!r}")
    for name in shape.positive:
        number = values.get(name)
        if not (isinstance(number, float) and 0 < number < float("inf")):
            raise InputError(f"{where}: {name} is {number!r}; allowed: a number > 0")
    return cls(**values)


def _part(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(f"{where} is {data!r}; allowed: an object with {', '.join(f.name for f in fields(cls))}")
    values = {k: _field(cls, k, v, where) for k, v in data.items()}
    for f in fields(cls):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{where} has no {f.name!r}")
    return cls(**values)


@lru_cache(maxsize=1024)
def _annotation(cls: Any, key: str) -> str:
    annotation = str(cls.__annotations__[key])
    return annotation.split("'")[1] if "ForwardRef" in annotation else annotation


def _field(cls: Any, key: str, value: Any, where: str) -> Any:
    """``value`` as the annotated type of ``cls.key`` (annotations are strings here: the modules postpone them)."""
    if key not in cls.__annotations__:
        raise unknown_choice(f"{where}: key", key, cls.__annotations__)
    annotation = _annotation(cls, key)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if annotation == "float" and number:
        return float(value)
    if annotation == "int" and number and value == int(value):
        return int(value)
    if annotation in ("str", "Origin") and isinstance(value, str):
        return value
    if annotation == "bool" and isinstance(value, bool):
        return value
    if annotation.startswith("tuple[str") and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if annotation.startswith("Mapping[str, ") and isinstance(value, dict):
        if "float" in annotation and all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in value.values()
        ):
            return {k: float(v) for k, v in value.items()}
        if "float" not in annotation and all(isinstance(v, str) for v in value.values()):
            return value
    raise InputError(f"{where}: {key} is {value!r}; allowed: {annotation}")


def load_profile(path: str | Path) -> HardwareProfile:
    """Read a profile. Raises ``InputError`` for a missing, corrupt or newer file."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"hardware profile {str(path)!r} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"hardware profile {str(path)!r} is not valid JSON: {error}") from None
    return profile_from_dict(data, f"hardware profile {str(path)!r}")


def save_profile(profile: HardwareProfile, path: str | Path) -> Path:
    """Write ``profile`` so that a reader sees the old file or the whole new one. Raises ``InputError`` if it cannot."""
    return write_json(profile_to_dict(profile), path)


def write_json(data: Any, path: str | Path) -> Path:
    """Write ``data`` as JSON through a temporary file in the same folder and a rename."""
    path = Path(path)
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        import tempfile  # which takes milliseconds to load, and only calibration writes

        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as f:
            temporary = f.name
            json.dump(data, f, indent=1)
            f.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror or error}") from None
    return path
