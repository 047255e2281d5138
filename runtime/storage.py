"""The tensors behind a group's ``GroupBuffers``, allocated, emptied and refilled as the program says."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from estimator.schedule.buffers import GroupBuffers
from estimator.schedule.events import Buffer
from estimator.sharding.layout import Group, Slot
from runtime.context import current_ledger, managed_memory

Fill = Callable[[str, Tensor], None]
"""Writes the initial values of the parameter of that name into an fp32 tensor of its shape."""
TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class GroupStorage:
    """One group's live tensors by buffer role.

    ``full_params`` keeps one tensor object whose storage is emptied and refilled, because autograd's saved weights
    point to it; all other buffers are made and dropped.
    """

    def __init__(
        self, group: Group, buffers: GroupBuffers, slots: list[Slot], params: list[nn.Parameter], dtype: str,
        device: torch.device, rank: int,
    ) -> None:  # fmt: skip
        self.group, self.buffers, self.slots, self.params = group, buffers, slots, params
        self.dtype, self.device, self.rank = TORCH_DTYPES[dtype], device, rank
        self.host = torch.device("meta") if device.type == "meta" else torch.device("cpu")
        self.tensors: dict[str, Tensor] = {}
        self.trained = [p.requires_grad for p in params]
        self._n_shards = group.padded_numel // group.shard_numel

    # ---- making and dropping --------------------------------------------------------------------------------------

    def alloc(self, buffer: Buffer) -> Tensor:
        """Bring ``buffer`` to life, uninitialised (gradients: zero)."""
        if buffer.role == "full_params" and buffer.role in self.tensors:
            full = self.tensors["full_params"]
            full.untyped_storage().resize_(buffer.n_bytes)
            self._meter(buffer, alive=True)
            return full
        fp32 = buffer.category in ("master_params", "optimizer_state", "temporaries")
        dtype = torch.float32 if fp32 else self.dtype
        numel = buffer.n_bytes // dtype.itemsize
        place = self.host if buffer.place == "host" else self.device
        pinned = buffer.place == "host" and self.device.type == "cuda"
        make = torch.zeros if buffer.role in ("full_grads", "optimizer_state_0", "optimizer_state_1") else torch.empty
        with managed_memory():
            tensor = make(numel, dtype=dtype, device=place, pin_memory=pinned)
        self.tensors[buffer.role] = tensor
        self._meter(buffer, alive=True)
        if buffer.role == "full_grads":
            self._point_grads(tensor)
        return tensor

    def free(self, buffer: Buffer) -> None:
        """Give ``buffer``'s bytes back."""
        self._meter(buffer, alive=False)
        if buffer.role == "full_params":
            self.tensors["full_params"].untyped_storage().resize_(0)
            return
        if buffer.role == "full_grads":
            for param in self.params:
                param.grad = None
        del self.tensors[buffer.role]

    def _meter(self, buffer: Buffer, alive: bool) -> None:
        ledger = current_ledger()
        if ledger is not None:
            storage = self.tensors[buffer.role].untyped_storage()
            ledger.hold(storage._cdata, buffer, storage) if alive else ledger.release(storage._cdata)

    def meter_all(self) -> None:
        """Report every buffer that is alive now (a ledger that starts later than the engine)."""
        for buffer in self._all_buffers():
            if buffer.role in self.tensors and self.tensors[buffer.role].untyped_storage().nbytes():
                self._meter(buffer, alive=True)

    def _all_buffers(self) -> list[Buffer]:
        b = self.buffers
        named = (b.full_params, b.kept_params, b.full_grads, b.grad_shard, b.host_grads, b.master, *b.optimizer_states)
        return [x for x in named if x is not None]

    # ---- filling --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def adopt_parameters(self, names: list[str], fill: Fill | None) -> None:
        """Copy the model's own values into the flat buffers, then let the parameters view them.

        The values are the parameters' own, or what ``fill`` writes for the parameter of each name (``names``: in slot order).
        """
        with managed_memory():
            full32 = torch.zeros(self.group.padded_numel, dtype=torch.float32, device=self.params[0].device)
            for name, slot, param in zip(names, self.slots, self.params, strict=True):
                if fill is None:
                    _cut(full32, slot).copy_(param.detach())
                else:
                    fill(name, _cut(full32, slot))
            shard32 = self._own_slice(full32)
            if "master" in self.tensors:
                self.tensors["master"].copy_(shard32)
            kept = self.tensors.get("kept_params")
            if kept is not None:
                kept.copy_(shard32 if kept.numel() == self.group.shard_numel else full32)
                full = torch.empty(self.group.padded_numel, dtype=self.dtype, device=self.device)
                self.tensors["full_params"] = full
            else:
                full = self.tensors["full_params"]
                full.copy_(full32)
            for slot, param in zip(self.slots, self.params, strict=True):
                param.data = _cut(full, slot)
            if kept is not None:
                full.untyped_storage().resize_(0)

    def _point_grads(self, flat: Tensor) -> None:
        for slot, param, trained in zip(self.slots, self.params, self.trained, strict=True):
            if trained:
                param.grad = _cut(flat, slot)

    # ---- views ----------------------------------------------------------------------------------------------------

    def _own_slice(self, full: Tensor) -> Tensor:
        if self._n_shards == 1:
            return full
        start = self.rank * self.group.shard_numel
        return full[start : start + self.group.shard_numel]

    @property
    def own_full_params(self) -> Tensor:
        """This rank's slice of ``full_params``."""
        return self._own_slice(self.tensors["full_params"])

    @property
    def own_full_grads(self) -> Tensor:
        """This rank's slice of ``full_grads``."""
        return self._own_slice(self.tensors["full_grads"])

    @property
    def step_grads(self) -> Tensor:
        """The gradients that the optimizer reads: on the host, reduced, or in full."""
        on_host = self.tensors.get("host_grads")
        return self.reduced_grads if on_host is None else on_host

    @property
    def reduced_grads(self) -> Tensor:
        """This rank's gradients after reduction, on the device."""
        shard = self.tensors.get("grad_shard")
        return self.own_full_grads if shard is None else shard

    @property
    def device_shard(self) -> Tensor:
        """This rank's parameters on the device, in the model's dtype, where they are kept there."""
        kept = self.tensors.get("kept_params")
        return self.own_full_params if kept is None else kept

    @property
    def step_params(self) -> Tensor:
        """What the optimizer writes back to in the model's dtype: the place from which parameters are published."""
        if "host_update" in self.tensors:
            return self.tensors["host_update"]
        kept = self.tensors.get("kept_params")
        if kept is None:
            return self.own_full_params
        return kept if kept.numel() == self.group.shard_numel else self._own_slice(kept)

    @property
    def master(self) -> Tensor:
        """fp32 parameters that the optimizer steps; the model's own where those are fp32 and in the same place."""
        master = self.tensors.get("master")
        return self.step_params if master is None else master


def _cut(flat: Tensor, slot: Slot) -> Tensor:
    """The parameter at ``slot`` as a view of ``flat``."""
    return flat[slot.offset : slot.offset + slot.param.numel].view(slot.param.shape)
