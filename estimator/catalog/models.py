"""Models by name. Each is stored as Hugging Face config keys and goes through the same door as a user's file."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from estimator.catalog.hardware import DATA, load_data, normal
from estimator.errors import InputError
from estimator.job.fields import nearest, shown
from estimator.job.hf import spec_from_config
from estimator.job.model import ModelSpec


@lru_cache(maxsize=1)
def _entries() -> dict[str, dict[str, Any]]:
    """Entry by catalogue name, in the order of the files."""
    files = sorted((DATA / "models").glob("*.json"))
    return {name: entry for file in files for name, entry in load_data(f"models/{file.name}").items()}


@lru_cache(maxsize=1)
def _model_keys() -> dict[str, str]:
    """Catalogue name by every accepted spelling."""
    return {normal(alias): name for name, entry in _entries().items() for alias in (name, *entry["aliases"])}


def model_names() -> tuple[str, ...]:
    """Catalogue names of all models."""
    return tuple(_entries())


def find_model(name: str) -> str | None:
    """Catalogue name for ``name`` (any case, an alias, or a Hugging Face id), ``None`` when there is none."""
    return _model_keys().get(normal(name))


def model(name: str) -> ModelSpec:
    """The model called ``name``. Raises ``InputError`` with the nearest name when there is none."""
    key = find_model(name) if isinstance(name, str) else None
    if key is None:
        raise InputError(
            f"model is {shown(name)}; allowed: a catalogue name such as 'llama-3-8b', a config.json, "
            f"or a folder with one{nearest(name, _model_keys())}"
        )
    return _build_model(key)


@lru_cache(maxsize=256)
def _build_model(key: str) -> ModelSpec:
    return spec_from_config(_entries()[key]["config"], name=key)


def published_params(name: str) -> int:
    """Exact parameter count that the catalogue holds for ``name``."""
    return int(_entries()[model(name).name]["n_params"])
