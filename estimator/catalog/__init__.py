"""The catalogue: GPUs, servers and models by name; every figure with its source and date."""

from estimator.catalog.hardware import cluster, gpu, gpu_names, host_of
from estimator.catalog.models import find_model, model, model_names, published_params

__all__ = ["cluster", "find_model", "gpu", "gpu_names", "host_of", "model", "model_names", "published_params"]
