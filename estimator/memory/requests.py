"""How a framework asks the caching allocator for its buffers: from which stream's pool, in how many pieces, and when.

Each stream has a pool of its own. A block that a second stream uses (``record_stream``) waits, when freed, for what that stream
had to do; the host runs ahead of the device by as many units as the framework lets it, and so far such blocks are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Facts of a framework's code. Roles are those of ``Buffer``."""

    pools: Mapping[str, str] = field(default_factory=dict)
    """Stream by role; all others, and what operators ask for, come from the compute stream's pool."""
    waiting: frozenset[str] = frozenset()
    """Roles that another stream still uses when they are freed."""
    paced_by: frozenset[str] = frozenset()
    """Roles before whose allocation the host waits until what was freed before the one before it is done with."""
    by_param: frozenset[str] = frozenset()
    """Roles that are a tensor for each parameter."""
    late_states: bool = False
    """The optimizer's states are made in the first step, when the optimizer runs, among what that step has left in the cache."""
    moves_params: bool = False
    """Parameters are made one by one, and then moved into a buffer: their first places stay in the cache."""


_STATES = frozenset(("optimizer_state_0", "optimizer_state_1", "optimizer_state_2"))

# torch/distributed/fsdp/_flat_param.py and _runtime_utils.py: shards are cast in the pre-unshard stream, gathered in the unshard stream;
# freed parameters wait for the compute stream, gradients for the post-backward stream; the free-event queue lets two gathers be under
# way (limit_all_gathers)
_FSDP1 = Requests(
    pools={
        "cast_shard": "pre_unshard", "full_params": "unshard", "full_grads": "post_backward", "reduced": "post_backward",
        "grad_shard": "post_backward", "widened": "post_backward",
    },
    waiting=frozenset(("full_params", "flat_grads")),
    paced_by=frozenset(("full_params",)),
    late_states=True,
)  # fmt: skip

# megatron/core/distributed/param_and_grad_buffer.py: parameters are copied into param_data; optimizer/distrib_optimizer.py: their fp32
# shards are clones; states are made by the optimizer's first step
_MEGATRON = Requests(by_param=_STATES | {"master"}, late_states=True, moves_params=True)

REQUESTS: dict[str, Requests] = {
    "zerocast": Requests(),
    "fsdp1": _FSDP1,
    "composer": _FSDP1,
    # torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py and _fsdp_param.py: what is gathered is made in the copy-in stream, what is
    # reduced comes in the reduce-scatter stream; events order them, nothing waits in the allocator
    "fsdp2": Requests(
        pools={
            "cast_shard": "copy_in", "gathered": "copy_in", "reduced": "reduce_scatter", "grad_shard": "reduce_scatter",
            "widened": "reduce_scatter",
        },
        by_param=_STATES | {"kept_params", "full_params"},
        late_states=True,
    ),
    # deepspeed/runtime/zero/stage_1_and_2.py and stage3.py: initialize_optimizer_states runs before the first step
    "deepspeed": Requests(),
    "megatron": _MEGATRON,
    "megatron_bridge": _MEGATRON,
}  # fmt: skip
"""By framework."""
