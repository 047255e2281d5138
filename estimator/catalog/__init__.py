"""The catalogue: GPUs, servers, machine types and models by name; every figure with its source and date."""

from estimator.catalog.hardware import cluster, gpu, gpu_names, host_of
from estimator.catalog.machines import MachineType, machine_names, machine_type
from estimator.catalog.models import find_model, model, model_names, published_params

__all__ = [
    "MachineType", "cluster", "find_model", "gpu", "gpu_names", "host_of", "machine_names", "machine_type", "model", "model_names",
    "published_params",
]  # fmt: skip
