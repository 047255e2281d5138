"""Which buffers a group of parameters has, by ZeRO stage, offload and precision.

``device`` buffers count towards the GPU's peak, ``host`` buffers towards host memory. Sizes follow
Rajbhandari et al. 2020 (table 1: 2 + 2 + 12 bytes per parameter for mixed-precision Adam), made exact by padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from estimator.job.framework import FRAMEWORKS
from estimator.job.optimizers import STATE_BLOCK
from estimator.job.strategy import OPTIMIZER_STATES, Strategy
from estimator.ops.kernels.optimizer import RULES
from estimator.schedule.events import Buffer, Place
from estimator.schedule.servers import Serving
from estimator.sharding.layout import ALIGNMENT_NUMEL, Group, align
from estimator.units import DTYPE_BYTES

UPDATE_CHUNK_NUMEL = 1 << 24
"""Elements that one optimizer call updates at a time: bounds its fp32 copy of low-precision gradients to 64 MiB."""


class DevicePart(NamedTuple):
    """What the device steps of a group whose optimizer is split: the end of the rank's shard, behind the host's part."""

    numel: int
    master: Buffer | None
    optimizer_states: tuple[Buffer, ...]
    update_temp: Buffer | None


class UnitBuffers(NamedTuple):
    """What a unit has beside these where a framework gathers and reduces whole units (``estimator.schedule.unit_buffers``)."""

    cast: Buffer | None
    """This rank's shard in the dtype in which it is gathered, where it is kept in another."""
    gathered: Buffer | None
    """What is gathered, where parameters are copied out of it."""
    written: Buffer
    """Gradients as autograd leaves them; the unit's backward pass makes room for them, bit by bit."""
    flat: Buffer | None
    """These put together, where the parameters are views of a flat one."""
    accumulated: Buffer
    """In a pipeline: gradients of a step's passes so far, in the dtype in which they are reduced."""
    widened: Buffer | None
    """A later micro-batch's reduced shard in the dtype in which shards are kept, where it is reduced in another."""


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
    """What the optimizer steps; ``None`` where that is the parameters themselves: in the same dtype and place."""
    optimizer_states: tuple[Buffer, ...]
    update_temp: Buffer | None
    """fp32 copies of a chunk of what is low-precision (gradients, masters, states) during a step that cannot read it as it is."""
    host_update: Buffer | None
    """Pinned low-precision copy of updated masters on their way back to the device."""
    secondary_params: Buffer | None = None
    """This rank's part of the copy that ranks nearby share."""
    received: Buffer | None = None
    """On a parameter server: what other ranks have pushed."""
    server_sum: Buffer | None = None
    """On a parameter server: the sum of what all ranks have pushed, in fp32."""
    is_stepped: bool = True
    """False: parameter servers step it, and this rank is none of them."""
    device_part: DevicePart | None = None
    """Where the optimizer is split between host and device, the device's; ``master`` and so on are then the host's part."""
    unit: UnitBuffers | None = None
    gathered: Buffer | None = None
    """What is gathered, where parameters are then copied out of it."""
    own_shard: Buffer | None = None
    """Beside ``full_params`` that stay: this rank's shard of them."""
    lasting_grads: bool = False
    """``full_grads`` lives from step to step; under stage 3 with shared buckets it is ``grad_shard`` that does."""
    bucketed: bool = False
    """Gradients are written into buckets that all groups share: ``full_grads`` is what of these is this group's."""

    @property
    def is_fetched(self) -> bool:
        """True when ``full_params`` must be brought in before use and is dropped afterwards."""
        return self.kept_params is not None

    @property
    def persistent(self) -> list[Buffer]:
        """Buffers that live from step to step."""
        kept = self.kept_params if self.is_fetched else self.full_params
        on_device = (
            (self.device_part.master, *self.device_part.optimizer_states) if self.device_part is not None else ()
        )
        grads = (self.grad_shard if self.bucketed else self.full_grads) if self.lasting_grads else None
        grads = grads if grads is not None and grads.n_bytes else None
        held = (
            kept,
            self.own_shard,
            grads,
            self.secondary_params,
            self.host_grads,
            self.master,
            *self.optimizer_states,
            *on_device,
        )
        return [b for b in held if b is not None and b.place != "nvme"]


def takes_fused_step(strategy: Strategy, kernels: frozenset[str]) -> bool:
    """Whether the device's optimizer step reads gradients of any dtype: that of one of ``kernels``, and the references' of 8-bit
    states."""
    return strategy.optimizer == "adamw8bit" or steps_by_kernel(strategy, kernels)


def steps_by_kernel(strategy: Strategy, kernels: frozenset[str]) -> bool:
    """Whether the device's optimizer step is one of ``kernels``: theirs are for fp32 masters and states, all of which
    they step."""
    rule = RULES.get(strategy.optimizer.removesuffix("8bit"))
    is_kernel = rule is not None and rule.kernel in kernels
    return is_kernel and strategy.masters == strategy.states == "fp32" and not strategy.freezes_variance


def n_widened(strategy: Strategy) -> int:
    """Tensors of one element per parameter that a step in plain torch must widen to fp32."""
    n_states = OPTIMIZER_STATES[strategy.optimizer]
    return (strategy.step_grads != "fp32") + (strategy.masters != "fp32") + n_states * (strategy.states != "fp32")


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
    """The stage as which the group runs where ``zero_stage`` is in effect: experts that no two ranks have leave nothing to shard."""
    if group.kind.expert and group.n_shards == 1:
        return 0
    return min(zero_stage, 2) if group.kind.resident else zero_stage


def group_buffers(
    group: Group, strategy: Strategy, zero_stage: int, *, fused_step: bool = False, serving: Serving | None = None
) -> GroupBuffers:
    """All buffers of ``group`` under ``strategy`` with ``zero_stage`` in effect.

    ``fused_step``: the device's optimizer step reads low-precision gradients itself (a kernel of ``runtime.kernels``);
    ``serving``: with parameter servers, of which rank.
    """
    g, width = group.number, DTYPE_BYTES[strategy.dtype]
    full_bytes, shard_bytes = group.padded_numel * width, group.shard_numel * width
    grad_width = DTYPE_BYTES[strategy.grads]
    full_grad_bytes, grad_shard_bytes = group.padded_numel * grad_width, group.shard_numel * grad_width
    own_masters = strategy.masters != strategy.dtype
    step_place: Place = "host" if strategy.offload_optimizer else "device"
    state_place: Place = "nvme" if strategy.offload_nvme else step_place
    offload_param = is_offloaded(group, strategy)
    in_step, zero_stage = zero_stage, stage_of(group, zero_stage)
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

    early, profile = zero_stage >= 2, FRAMEWORKS[strategy.framework]
    separate_master = own_masters or (strategy.offload_optimizer and not offload_param) or profile.own_masters
    bucketed = profile.bucket_numel > 0 and early and not strategy.quantized_grads
    n_wide = 0 if (fused_step or profile.bucket_numel) and step_place == "device" else n_widened(strategy)
    on_host = host_numel(group, strategy)
    here = on_host or group.shard_numel
    master_bytes = here * DTYPE_BYTES[strategy.masters]
    buffers = GroupBuffers(
        full_params=Buffer("full_params", g, "gathered_params" if fetched else "params", full_bytes),
        kept_params=kept,
        staging=staging,
        full_grads=Buffer("full_grads", g, "reduce_buckets" if early else "grads", full_grad_bytes),
        grad_shard=Buffer("grad_shard", g, "grads", grad_shard_bytes) if early else None,
        reduced=Buffer("reduced", g, "reduce_buckets", grad_shard_bytes) if early else None,
        host_grads=Buffer("host_grads", g, "grads", on_host * grad_width, "host") if on_host else None,
        master=Buffer("master", g, "master_params", master_bytes, state_place) if separate_master else None,
        optimizer_states=states_of("optimizer_state", group, here, state_place, strategy),
        update_temp=_temp("update_temp", g, here, n_wide, step_place) or step_temp(group, strategy),
        host_update=Buffer("host_update", g, "offload_staging", on_host * width, "host")
        if own_masters and strategy.offload_optimizer and not offload_param
        else None,
        secondary_params=_secondary(group, strategy) if fetched and zero_stage == 3 else None,
        device_part=_device_part(group, strategy, fused_step) if 0 < on_host < group.shard_numel else None,
        lasting_grads=profile.lasting_grads or (bucketed and in_step == 3 and not strategy.offload_optimizer),
        bucketed=bucketed,
        own_shard=Buffer("own_shard", g, "params", shard_bytes) if bucketed and zero_stage < in_step == 3 else None,
        gathered=Buffer("gathered", g, "gathered_params", full_bytes)
        if profile.bucket_numel and zero_stage == 3 and not strategy.quantized_weights
        else None,
    )
    if not group.kind.trained:
        return _frozen(buffers)
    return buffers if serving is None else _served(buffers, group, serving)


def _served(b: GroupBuffers, group: Group, serving: Serving) -> GroupBuffers:
    """Of ``b`` what a rank has where servers step for all, and what a server has beside it."""
    if not serving.is_server:
        return b._replace(master=None, optimizer_states=(), update_temp=None, is_stepped=False)
    g, grad_width = group.number, b.full_grads.n_bytes // group.padded_numel
    others_bytes = (serving.n_ranks - 1) * group.shard_numel * grad_width
    return b._replace(
        received=Buffer("received", g, "reduce_buckets", others_bytes) if others_bytes else None,
        server_sum=Buffer("server_sum", g, "grads", 4 * group.shard_numel),
    )


def _frozen(b: GroupBuffers) -> GroupBuffers:
    """Of ``b`` what parameters have that are not trained."""
    return GroupBuffers(
        full_params=b.full_params,
        kept_params=b.kept_params,
        staging=b.staging,
        secondary_params=b.secondary_params,
        gathered=b.gathered,
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
    n_wide = 0 if fused_step else n_widened(strategy)
    n_bytes = numel * DTYPE_BYTES[strategy.masters]
    master = Buffer("device_master", g, "master_params", n_bytes) if strategy.masters != strategy.dtype else None
    return DevicePart(
        numel=numel,
        master=master,
        optimizer_states=states_of("device_state", group, numel, "device", strategy),
        update_temp=_temp("device_temp", g, numel, n_wide, "device"),
    )


def states_of(role: str, group: Group, numel: int, place: Place, strategy: Strategy) -> tuple[Buffer, ...]:
    """Of ``numel`` elements of one rank's shard of ``group``."""
    sizes = state_sizes(group, numel, strategy)
    return tuple(Buffer(f"{role}_{i}", group.number, "optimizer_state", size, place) for i, size in enumerate(sizes))


def state_sizes(group: Group, numel: int, strategy: Strategy) -> tuple[int, ...]:
    """Bytes of each of the optimizer's states."""
    n_states = OPTIMIZER_STATES[strategy.optimizer]
    if strategy.optimizer == "adamw8bit":
        return (numel + 4 * -(-numel // STATE_BLOCK),) * n_states
    if strategy.optimizer == "adafactor":
        return (4 * -(-group.factored_numel // group.n_shards),)
    if strategy.optimizer == "muon":
        return 4 * numel, 4 * -(-group.vector_numel // group.n_shards)
    return (numel * DTYPE_BYTES[strategy.states],) * n_states


def step_temp(group: Group, strategy: Strategy) -> Buffer | None:
    """Of a step that goes parameter by parameter, besides what is widened for it. Adafactor: an fp32 update of the largest one and its
    square. Muon: of the largest matrix, which a rank has whole, momentum, X, the next X and B X in bf16, and two products of X and its
    transpose, at most as large."""
    n_bytes = 0
    if strategy.optimizer == "adafactor":
        n_bytes = 8 * -(-group.largest_numel // group.n_shards)
    if strategy.optimizer == "muon" and group.vector_numel < group.numel:
        n_bytes = 6 * 2 * group.largest_numel
    return Buffer("step_temp", group.number, "temporaries", n_bytes) if n_bytes and group.kind.trained else None


def _temp(role: str, group: int, numel: int, n_wide: int, place: Place) -> Buffer | None:
    """fp32 room for a chunk of each of ``n_wide`` tensors."""
    n_bytes = n_wide * min(numel, UPDATE_CHUNK_NUMEL) * DTYPE_BYTES["fp32"]
    return Buffer(role, group, "temporaries", n_bytes, place) if n_wide else None


def delayed_buffers(buffers: Sequence[GroupBuffers]) -> list[Buffer]:
    """Where a late step works all the time: every group's way back to the device, and one temporary for all groups."""
    temps = [b.update_temp for b in buffers if b.update_temp is not None]
    updates = [b.host_update for b in buffers if b.host_update is not None]
    return [*updates, *([max(temps, key=lambda temp: temp.n_bytes)] if temps else [])]
