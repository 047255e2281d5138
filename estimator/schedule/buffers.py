"""Which buffers a group of parameters has, by ZeRO stage, offload and precision.

``device`` buffers count towards the GPU's peak, ``host`` buffers towards host memory. Sizes follow
Rajbhandari et al. 2020 (table 1: 2 + 2 + 12 bytes per parameter for mixed-precision Adam), made exact by padding.
"""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.strategy import OPTIMIZER_STATES, Strategy
from estimator.schedule.events import Buffer, Place
from estimator.sharding.layout import Group
from estimator.units import DTYPE_BYTES

MASTER_BYTES = 4
"""Master parameters and optimizer states are fp32."""

UPDATE_CHUNK_NUMEL = 1 << 24
"""Elements that one optimizer call updates at a time: bounds its fp32 copy of low-precision gradients to 64 MiB."""


class GroupBuffers(NamedTuple):
    """Buffers of one group; ``None`` where the strategy has no such buffer."""

    full_params: Buffer
    """Parameters as the model reads them. Lives always, or (see ``is_fetched``) from fetch to release."""
    kept_params: Buffer | None
    """What remains while ``full_params`` is gone: the device shard (stage 3) or the host copy (parameter offload)."""
    staging: Buffer | None
    """Device copy of an offloaded shard on its way into the all-gather."""
    full_grads: Buffer
    """Gradients as backward writes them: kept until the step (stages 0, 1) or until they are reduced (2, 3)."""
    grad_shard: Buffer | None
    """This rank's reduced gradients under stages 2 and 3."""
    reduced: Buffer | None
    """Reduce-scatter output of a later micro-batch, before it is added to ``grad_shard``."""
    host_grads: Buffer | None
    master: Buffer | None
    """fp32 copy of this rank's parameters; ``None`` where the parameters themselves are fp32 and in the same place."""
    optimizer_states: tuple[Buffer, ...]
    update_temp: Buffer | None
    """fp32 copy of a chunk of low-precision gradients during the step."""
    host_update: Buffer | None
    """Pinned low-precision copy of updated masters on their way back to the device."""

    @property
    def is_fetched(self) -> bool:
        """True when ``full_params`` must be brought in before use and is dropped afterwards."""
        return self.kept_params is not None


def group_buffers(group: Group, strategy: Strategy, zero_stage: int) -> GroupBuffers:
    """All buffers of ``group`` under ``strategy`` with ``zero_stage`` in effect."""
    g, width = group.number, DTYPE_BYTES[strategy.dtype]
    full_bytes, shard_bytes = group.padded_numel * width, group.shard_numel * width
    low_precision = strategy.dtype != "fp32"
    step_place: Place = "host" if strategy.offload_optimizer else "device"
    fetched = zero_stage == 3 or strategy.offload_param

    kept: Buffer | None = None
    staging: Buffer | None = None
    if zero_stage == 3:
        kept_place: Place = "host" if strategy.offload_param else "device"
        kept = Buffer("kept_params", g, "params", shard_bytes, kept_place)
        if strategy.offload_param:
            staging = Buffer("staging", g, "offload_staging", shard_bytes)
    elif strategy.offload_param:
        kept = Buffer("kept_params", g, "params", full_bytes, "host")

    early = zero_stage >= 2
    separate_master = low_precision or (strategy.offload_optimizer and not strategy.offload_param)
    fp32_bytes = group.shard_numel * MASTER_BYTES
    chunk_bytes = min(group.shard_numel, UPDATE_CHUNK_NUMEL) * MASTER_BYTES
    return GroupBuffers(
        full_params=Buffer("full_params", g, "gathered_params" if fetched else "params", full_bytes),
        kept_params=kept,
        staging=staging,
        full_grads=Buffer("full_grads", g, "reduce_buckets" if early else "grads", full_bytes),
        grad_shard=Buffer("grad_shard", g, "grads", shard_bytes) if early else None,
        reduced=Buffer("reduced", g, "reduce_buckets", shard_bytes) if early else None,
        host_grads=Buffer("host_grads", g, "grads", shard_bytes, "host") if strategy.offload_optimizer else None,
        master=Buffer("master", g, "master_params", fp32_bytes, step_place) if separate_master else None,
        optimizer_states=tuple(
            Buffer(f"optimizer_state_{i}", g, "optimizer_state", fp32_bytes, step_place)
            for i in range(OPTIMIZER_STATES[strategy.optimizer])
        ),
        update_temp=Buffer("update_temp", g, "temporaries", chunk_bytes, step_place) if low_precision else None,
        host_update=Buffer("host_update", g, "offload_staging", shard_bytes, "host")
        if low_precision and strategy.offload_optimizer and not strategy.offload_param
        else None,
    )
