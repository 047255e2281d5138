"""Which parameters have a gradient that is not finite, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.comm import Communicator
from runtime.storage import GroupStorage


@torch.no_grad()
def nonfinite_gradients(
    storages: Sequence[GroupStorage], names: Sequence[Sequence[str]], comm: Communicator, device: torch.device
) -> list[str]:
    """Names of the parameters with a NaN or an infinity in this step's reduced gradients, in the model's order.

    ``names``: of every storage's slots. Each rank looks at what it steps; one small sum over ranks, which is not
    counted, makes the answer the same on all. The host waits. A collective call.
    """
    found = torch.stack([flag for storage in storages for flag in _flags(storage, device)])
    comm.sum_now(found)
    every = [name for of_group in names for name in of_group]
    return [name for name, n_ranks in zip(every, found.tolist(), strict=True) if n_ranks]


def _flags(storage: GroupStorage, device: torch.device) -> list[torch.Tensor]:
    """fp32 scalars on ``device``, one per slot: 1 where this rank's part of the slot's gradient is not finite."""
    group = storage.group
    start = storage.rank * group.shard_numel if group.shard_numel < group.padded_numel else 0
    on_device = {"grad_shard", "full_grads", "server_sum"} & storage.tensors.keys()
    if not storage.buffers.is_stepped:  # servers look
        return [torch.zeros((), device=device) for _ in storage.slots]
    grads = [storage.reduced_grads] if on_device else []
    if "host_grads" in storage.tensors:  # the beginning of the shard, or all of it
        grads.append(storage.step_grads)
    flags = []
    for slot in storage.slots:
        low, high = max(slot.offset - start, 0), max(slot.offset + slot.param.numel - start, 0)
        bad = [flat[low:high].isfinite().all().logical_not().to(device) for flat in grads]
        flags.append(torch.stack(bad).any().float())
    return flags
