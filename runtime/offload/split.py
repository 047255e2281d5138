"""The two parts of an optimizer that host and device step at the same time (Twin-Flow, ZeRO-Offload++ 2023).

The host has the first ``estimator.schedule.buffers.host_numel`` elements of a rank's shard, the device the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.kernels.blockwise8 import Blockwise8
from runtime.kernels.optimizer import State
from runtime.optimizer import Shard
from runtime.storage import GroupStorage


def whole_shard(storage: GroupStorage) -> Shard:
    """What one place steps: all of the rank's shard, or the host's part of it."""
    tensors = storage.tensors
    return Shard(
        master=storage.master,
        grads=storage.step_grads,
        states=[_state(tensors[b.role], storage.master.numel()) for b in storage.buffers.optimizer_states],
        target=storage.step_params if "master" in tensors and tensors["master"].dtype != storage.dtype else None,
        temp=tensors.get("update_temp"),
    )


def _state(buffer: Tensor, numel: int) -> State:
    """A state of ``numel`` elements; of 8-bit ones codes come first, then their blocks' magnitudes."""
    if buffer.dtype != torch.uint8:
        return buffer
    return Blockwise8(buffer[:numel], buffer[numel:].view(torch.float32))


def device_part(storage: GroupStorage) -> Shard:
    """What the device steps where the host steps the rest; the parameters themselves are the masters where there are none."""
    part, tensors = storage.buffers.device_part, storage.tensors
    assert part is not None
    return Shard(
        master=_device_master(storage, part.numel),
        grads=storage.reduced_grads[-part.numel :],
        states=[tensors[b.role] for b in part.optimizer_states],
        target=storage.device_shard[-part.numel :] if "device_master" in tensors else None,
        temp=tensors.get("device_temp"),
    )


def _device_master(storage: GroupStorage, numel: int) -> Tensor:
    master = storage.tensors.get("device_master")
    return storage.device_shard[-numel:] if master is None else master


def masters_of(storage: GroupStorage) -> Tensor:
    """What the optimizer steps of the rank's whole shard; a copy on the host where two places step them."""
    part = storage.buffers.device_part
    if storage.files is not None:
        return storage.files.masters(storage)
    if part is None:
        return storage.master
    return torch.cat([storage.master, _device_master(storage, part.numel).to(storage.host)])
