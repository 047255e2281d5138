"""Moving a model's parameters into their groups' flat buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from estimator.sharding.units import Unit
from runtime.context import managed_memory
from runtime.parallel.layers import Fill, WholeLayers
from runtime.storage import GroupStorage, cut


@torch.no_grad()
def adopt_parameters(
    storages: Sequence[GroupStorage], units: Sequence[Unit], fill: Fill | None, layers: WholeLayers
) -> None:
    """Copy every parameter into its group, in the order of ``units``; then the parameters view their groups.

    The values are the parameters' own, or what ``fill`` writes for each name, of which ``layers`` take this rank's part. A group is fp32 and whole from its first
    parameter to its last.
    """
    homes = {
        (slot.unit, slot.param.name): (storage, slot, param)
        for storage in storages
        for slot, param in zip(storage.slots, storage.params, strict=True)
    }
    whole: dict[int, Tensor] = {}
    with managed_memory():
        for index, unit in enumerate(units):
            for described in unit.params:
                storage, slot, param = homes[index, described.name]
                group = storage.group
                if group.number not in whole:
                    whole[group.number] = torch.zeros(group.padded_numel, dtype=torch.float32, device=param.device)
                if fill is None:
                    cut(whole[group.number], slot).copy_(param.detach())
                else:
                    layers.fill(f"{unit.name}.{described.name}", cut(whole[group.number], slot), described.split, fill)
                if slot is storage.slots[-1]:
                    storage.adopt(whole.pop(group.number))
