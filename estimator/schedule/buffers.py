"""Which buffers a group of parameters has, by ZeRO stage, offload and precision.

``device`` buffers count towards the GPU's peak, ``host`` buffers towards host memory. Sizes follow
Rajbhandari et al. 2020 (table 1: 2 + 2 + 12 bytes per parameter for mixed-precision Adam), made exact by padding.
"""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.strategy import OPTIMIZER_STATES, Strategy
from estimator.schedule.events import Buffer, Place
from estimator.sharding.layout import ALIGNMENT_NUMEL, Group, align
from estimator.units import DTYPE_BYTES

MASTER_BYTES = 4
"""Master parameters and optimizer states are fp32."""

UPDATE_CHUNK_NUMEL = 1 << 24
"""Elements that one optimizer call updates at a time: bounds its fp32 copy of low-precision gradients to 64 MiB."""


class DevicePart(NamedTuple):
    """What the device steps of a group whose optimizer is split: the end of the rank's shard, behind the host's part."""

    numel: int
    master: Buffer | None
    optimizer_states: tuple[Buffer, ...]
    update_temp: Buffer | None


class GroupBuffers(NamedTuple):
    """Buffers of one group; ``None`` where the strategy has no such buffer."""

    full_params: Buffer
    """Parameters as the model reads them. Lives always, or (see ``is_fetched``) from fetch to release."""
    kept_params: Buffer | None
    """What remains while ``full_params`` is gone: the device shard (stage 3) or the host copy (parameter offload)."""
    staging: Buffer | None
    """Device copy of an offloaded shard on its way into the all-gather."""
    full_grads: Buffer
    """Gradients as backward writes them: kept until the step (stages 0, 1) or until they are reduced (2, 3). Frozen
    parameters have none: it is empty there, and never allocated."""
    grad_shard: Buffer | None
    """This rank's reduced gradients under stages 2 and 3."""
    reduced: Buffer | None
    """Reduce-scatter output of a later micro-batch, before it is added to ``grad_shard``."""
    host_grads: Buffer | None
    master: Buffer | None
    """fp32 copy of this rank's parameters; ``None`` where the parameters themselves are fp32 and in the same place."""
    optimizer_states: tuple[Buffer, ...]
    update_temp: Buffer | None
    """fp32 copy of a chunk of low-precision gradients during a step that cannot read them as they are."""
    host_update: Buffer | None
    """Pinned low-precision copy of updated masters on their way back to the device."""
    secondary_params: Buffer | None = None
    """This rank's part of the copy that ranks nearby share."""
    device_part: DevicePart | None = None
    """Where the optimizer is split between host and device, the device's; ``master`` and so on are then the host's part."""

    @property
    def is_fetched(self) -> bool:
        """True when ``full_params`` must be brought in before use and is dropped afterwards."""
        return self.kept_params is not None


def host_numel(group: Group, strategy: Strategy) -> int:
    """Elements at the start of a rank's shard that the host steps: ``offload_fraction`` of them, aligned, never none."""
    if not strategy.offload_optimizer:
        return 0
    wanted = round(group.shard_numel * strategy.offload_fraction)
    return min(group.shard_numel, max(ALIGNMENT_NUMEL, align(wanted)))


def is_offloaded(group: Group, strategy: Strategy) -> bool:
    """Whether the group's parameters live in host memory."""
    return strategy.offload_param and not group.kind.resident


def stage_of(group: Group, zero_stage: int) -> int:
    """The stage as which the group runs where ``zero_stage`` is in effect."""
    return min(zero_stage, 2) if group.kind.resident else zero_stage


def group_buffers(group: Group, strategy: Strategy, zero_stage: int, *, fused_step: bool = False) -> GroupBuffers:
    """All buffers of ``group`` under ``strategy`` with ``zero_stage`` in effect.

    ``fused_step``: the device's optimizer step reads low-precision gradients itself (a kernel of ``runtime.kernels``).
    """
    g, width = group.number, DTYPE_BYTES[strategy.dtype]
    full_bytes, shard_bytes = group.padded_numel * width, group.shard_numel * width
    grad_width = DTYPE_BYTES[strategy.grads]
    full_grad_bytes, grad_shard_bytes = group.padded_numel * grad_width, group.shard_numel * grad_width
    low_precision = strategy.dtype != "fp32"
    step_place: Place = "host" if strategy.offload_optimizer else "device"
    state_place: Place = "nvme" if strategy.offload_nvme else step_place
    offload_param = is_offloaded(group, strategy)
    zero_stage = stage_of(group, zero_stage)
    fetched = zero_stage == 3 or offload_param

    kept: Buffer | None = None
    staging: Buffer | None = None
    if zero_stage == 3:
        kept_place: Place = "host" if offload_param else "device"
        kept = Buffer("kept_params", g, "params", shard_bytes, kept_place)
        if offload_param:
            staging = Buffer("staging", g, "offload_staging", shard_bytes)
    elif offload_param:
        kept = Buffer("kept_params", g, "params", full_bytes, "host")

    early = zero_stage >= 2
    separate_master = low_precision or (strategy.offload_optimizer and not offload_param)
    widens = strategy.grads != "fp32" and not (fused_step and step_place == "device")
    on_host = host_numel(group, strategy)
    here = on_host or group.shard_numel
    fp32_bytes = here * MASTER_BYTES
    buffers = GroupBuffers(
        full_params=Buffer("full_params", g, "gathered_params" if fetched else "params", full_bytes),
        kept_params=kept,
        staging=staging,
        full_grads=Buffer("full_grads", g, "reduce_buckets" if early else "grads", full_grad_bytes),
        grad_shard=Buffer("grad_shard", g, "grads", grad_shard_bytes) if early else None,
        reduced=Buffer("reduced", g, "reduce_buckets", grad_shard_bytes) if early else None,
        host_grads=Buffer("host_grads", g, "grads", on_host * grad_width, "host") if on_host else None,
        master=Buffer("master", g, "master_params", fp32_bytes, state_place) if separate_master else None,
        optimizer_states=_states("optimizer_state", g, here, state_place, strategy),
        update_temp=_temp("update_temp", g, here, step_place) if widens else None,
        host_update=Buffer("host_update", g, "offload_staging", on_host * width, "host")
        if low_precision and strategy.offload_optimizer and not offload_param
        else None,
        secondary_params=_secondary(group, strategy) if fetched and zero_stage == 3 else None,
        device_part=_device_part(group, strategy, fused_step) if 0 < on_host < group.shard_numel else None,
    )
    return buffers if group.kind.trained else _frozen(buffers)


def _frozen(b: GroupBuffers) -> GroupBuffers:
    """Of ``b`` what parameters have that are not trained."""
    return GroupBuffers(
        full_params=b.full_params,
        kept_params=b.kept_params,
        staging=b.staging,
        secondary_params=b.secondary_params,
        full_grads=b.full_grads._replace(n_bytes=0),
        grad_shard=None,
        reduced=None,
        host_grads=None,
        master=None,
        optimizer_states=(),
        update_temp=None,
        host_update=None,
    )


def _secondary(group: Group, strategy: Strategy) -> Buffer | None:
    n_bytes = group.padded_numel * DTYPE_BYTES[strategy.dtype]
    size = strategy.secondary_shard
    return Buffer("secondary_params", group.number, "params", n_bytes // size) if size else None


def _device_part(group: Group, strategy: Strategy, fused_step: bool) -> DevicePart:
    g, numel = group.number, group.shard_numel - host_numel(group, strategy)
    widens = strategy.grads != "fp32" and not fused_step
    master = Buffer("device_master", g, "master_params", numel * MASTER_BYTES) if strategy.dtype != "fp32" else None
    return DevicePart(
        numel=numel,
        master=master,
        optimizer_states=_states("device_state", g, numel, "device", strategy),
        update_temp=_temp("device_temp", g, numel, "device") if widens else None,
    )


def _states(role: str, group: int, numel: int, place: Place, strategy: Strategy) -> tuple[Buffer, ...]:
    return tuple(
        Buffer(f"{role}_{i}", group, "optimizer_state", numel * MASTER_BYTES, place)
        for i in range(OPTIMIZER_STATES[strategy.optimizer])
    )


def _temp(role: str, group: int, numel: int, place: Place) -> Buffer:
    return Buffer(role, group, "temporaries", min(numel, UPDATE_CHUNK_NUMEL) * MASTER_BYTES, place)
