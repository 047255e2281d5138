"""Machines that can be bought or rented: GPUs, network, local disks, price with region and date, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from estimator.catalog.hardware import load_data, normal
from estimator.errors import InputError
from estimator.job.fields import nearest, shown


@dataclass(frozen=True, kw_only=True)
class MachineType:
    """One row of ``data/machine_types.json``. ``None`` means that no figure was found, never zero."""

    name: str
    provider: str
    gpu: str
    """Catalogue key of its GPUs."""
    n_gpus: int
    n_nics: int | None
    """Network cards."""
    network_bytes_per_s: float | None
    """Of all its network cards together, in one direction."""
    host_memory_bytes: int | None
    host_cores: int | None
    """Physical cores, or virtual ones where only those are stated."""
    nvme_bytes: int | None
    """Local disks."""
    nvme_read_bytes_per_s: float | None
    nvme_write_bytes_per_s: float | None
    usd_per_hour: float | None
    """Of the whole machine, on demand unless ``price_region`` says otherwise."""
    price_region: str = ""
    price_date: str = ""
    """When the price was stated, in its source's words: prices age."""
    price_source: str = ""
    source: tuple[str, ...] = ()
    date: str = ""
    unsourced: tuple[str, ...] = ()
    note: str = ""

    @property
    def usd_per_gpu_hour(self) -> float | None:
        return None if self.usd_per_hour is None else self.usd_per_hour / self.n_gpus

    @property
    def network_bytes_per_s_per_gpu(self) -> float | None:
        return None if self.network_bytes_per_s is None else self.network_bytes_per_s / self.n_gpus


def machine_names(gpu: str | None = None) -> tuple[str, ...]:
    """Names of all machine types, or of those with the GPU of catalogue key ``gpu``."""
    return tuple(k for k, entry in load_data("machine_types.json").items() if gpu in (None, entry["gpu"]))


def machine_type(name: str) -> MachineType:
    """The machine type called ``name`` (any case). Raises ``InputError`` with the nearest name when there is none."""
    return _build(normal(name) if isinstance(name, str) else shown(name))


@lru_cache(maxsize=128)
def _build(key: str) -> MachineType:
    entries = load_data("machine_types.json")
    if key not in entries:
        raise InputError(
            f"machine is {shown(key)}; allowed: a name of the catalogue such as 'aws-p5.48xlarge'{nearest(key, entries)}"
        )
    entry = dict(entries[key])
    for field in ("source", "unsourced"):
        entry[field] = tuple(entry[field])
    return MachineType(name=key, **entry)
