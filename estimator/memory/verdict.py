"""Does it fit, and if not, what is to blame: one sentence with its numbers."""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.job import Job
from estimator.memory.device import DeviceMemory
from estimator.memory.reader import StepMemory
from estimator.units import format_bytes

_REMEDIES = {
    "params": "raise the ZeRO stage to 3 or offload parameters",
    "grads": "raise the ZeRO stage to 2 or 3",
    "master_params": "raise the ZeRO stage or offload the optimizer",
    "optimizer_state": "raise the ZeRO stage or offload the optimizer",
    "activations": "lower the micro-batch or recompute more",
    "logits_loss": "lower the micro-batch or the sequence length",
    "gathered_params": "lower the prefetch depth",
    "reduce_buckets": "lower the bucket size",
    "temporaries": "lower the micro-batch",
    "offload_staging": "lower the prefetch depth",
    "workspace": "lower the sequence length",
    "fragmentation": "set expandable_segments:True in PYTORCH_ALLOC_CONF",
}


class Verdict(NamedTuple):
    """Whether one rank fits its GPU and its share of the host, which is forecast where it is as likely as not; ``sentence`` says why
    not."""

    fits: bool
    fits_probability: float
    sentence: str


def judge(job: Job, memory: StepMemory, device: DeviceMemory) -> Verdict:
    """Hold the peak against the GPU, and the ranks of one node against its host memory, of which there is no doubt."""
    gpu, cluster = job.cluster.gpu, job.cluster
    if device.needed_bytes > gpu.memory_bytes:
        category, n_bytes = max(device.category_bytes_at_peak(memory).items(), key=lambda item: item[1])
        return Verdict(
            False,
            device.fits_probability,
            f"needs {format_bytes(device.needed_bytes)}, {gpu.name} has {format_bytes(gpu.memory_bytes)}: at its peak, {memory.peak_where}, "
            f"{category} take {format_bytes(n_bytes)}; {_REMEDIES.get(category, 'use more GPUs')}",
        )
    host_bytes = memory.host_peak_bytes * min(cluster.n_gpus, cluster.gpus_per_node)
    if host_bytes > cluster.host.memory_bytes:
        return Verdict(
            False,
            0.0,
            f"needs {format_bytes(host_bytes)} of host memory per node, it has {format_bytes(cluster.host.memory_bytes)}; "
            "offload less, raise the ZeRO stage or use more nodes",
        )
    return Verdict(True, device.fits_probability, "")
