"""The tensors behind a group's ``GroupBuffers``, allocated, emptied and refilled as the program says."""

from __future__ import annotations

from collections import defaultdict, deque

import torch
from torch import Tensor, nn

from estimator.job.strategy import Strategy
from estimator.schedule.buffers import GroupBuffers
from estimator.schedule.events import Buffer, Copy
from estimator.sharding.layout import Group, Slot
from runtime.context import current_ledger, managed_memory
from runtime.offload.states import NvmeStates, slot_memory

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


MESSAGE_ROLES = frozenset(
    f"{kind}{part}" for kind in ("", "received_", "unordered_") for part in ("codes", "counts", "scales", "ids", "rows")
)
"""Buffers of collectives that carry messages: bytes."""
_SUM_ROLES = frozenset(("error", "server_error", "partial_sum", "server_sum"))
"""fp32 beside gradients of any dtype."""
_ZERO_ROLES = frozenset(("full_grads", "error", "server_error"))


class GroupStorage:
    """One group's live tensors by buffer role.

    ``full_params`` keeps one tensor object whose storage is emptied and refilled, because autograd's saved weights
    point to it; all other buffers are made and dropped.
    """

    def __init__(
        self, group: Group, buffers: GroupBuffers, slots: list[Slot], params: list[nn.Parameter], strategy: Strategy,
        device: torch.device, rank: int,
    ) -> None:  # fmt: skip
        self.group, self.buffers, self.slots, self.params = group, buffers, slots, params
        self.dtype, self.grad_dtype = TORCH_DTYPES[strategy.dtype], TORCH_DTYPES[strategy.grads]
        self._step_dtypes = {
            "master_params": TORCH_DTYPES[strategy.masters],
            "optimizer_state": torch.uint8 if strategy.optimizer == "adamw8bit" else TORCH_DTYPES[strategy.states],
        }
        self.masters_dtype = self._step_dtypes["master_params"]
        self.device, self.rank = device, rank
        self.host = torch.device("meta") if device.type == "meta" else torch.device("cpu")
        self.tensors: dict[str, Tensor] = {}
        self._alive: dict[str, Buffer] = {}
        self._older: dict[str, deque[Tensor]] = defaultdict(deque)
        """Buffers that had a role before the one that has it, and live still: the oldest first, which goes first."""
        self._is_adopted = False
        self._n_shards = group.padded_numel // group.shard_numel
        self.files: NvmeStates | None = None
        """Where masters and states are while they are not in ``tensors``."""

    # ---- making and dropping --------------------------------------------------------------------------------------

    def alloc(self, buffer: Buffer) -> Tensor:
        """Bring ``buffer`` to life, uninitialised (gradients: zero)."""
        self._alive[buffer.role] = buffer
        if buffer.role == "full_params" and buffer.role in self.tensors:
            full = self.tensors["full_params"]
            full.untyped_storage().resize_(buffer.n_bytes)
            self._meter(buffer, alive=True)
            return full
        dtype = self._dtype_of(buffer)
        numel = buffer.n_bytes // dtype.itemsize
        place = self.host if buffer.place == "host" else self.device
        pinned = buffer.place == "host" and self.device.type == "cuda"
        make = torch.zeros if buffer.role in _ZERO_ROLES or buffer.category == "optimizer_state" else torch.empty
        with managed_memory():
            if buffer.role.startswith("slot_"):
                tensor = slot_memory(buffer.n_bytes, place, pinned=pinned)
            else:
                tensor = make(numel, dtype=dtype, device=place, pin_memory=pinned)
        if buffer.role in self.tensors:
            self._older[buffer.role].append(self.tensors[buffer.role])
        self.tensors[buffer.role] = tensor
        self._meter(buffer, alive=True)
        if buffer.role == "full_grads" and self._is_adopted:
            self._point_grads(tensor)
        return tensor

    def _dtype_of(self, buffer: Buffer) -> torch.dtype:
        if buffer.role in MESSAGE_ROLES:
            return torch.uint8
        if buffer.role in _SUM_ROLES or buffer.category == "temporaries":
            return torch.float32
        if buffer.category in self._step_dtypes:
            return self._step_dtypes[buffer.category]
        return self.grad_dtype if buffer.category in ("grads", "reduce_buckets") else self.dtype

    def free(self, buffer: Buffer) -> None:
        """Give ``buffer``'s bytes back; of several in its role, the oldest's."""
        if self._older[buffer.role]:
            self._release(self._older[buffer.role].popleft())
            return
        del self._alive[buffer.role]
        self._meter(buffer, alive=False)
        if buffer.role == "full_params":
            self.tensors["full_params"].untyped_storage().resize_(0)
            return
        if buffer.role == "full_grads":
            for param in self.params:
                param.grad = None
        del self.tensors[buffer.role]

    def oldest(self, role: str) -> Tensor:
        """Of the buffers in a role the one that goes first."""
        return self._older[role][0] if self._older[role] else self.tensors[role]

    def _meter(self, buffer: Buffer, alive: bool) -> None:
        tensor = self.tensors[buffer.role]
        self._hold(tensor, buffer) if alive else self._release(tensor)

    def _hold(self, tensor: Tensor, buffer: Buffer) -> None:
        if (ledger := current_ledger()) is not None:
            storage = tensor.untyped_storage()
            ledger.hold(storage._cdata, buffer, storage)

    def _release(self, tensor: Tensor) -> None:
        if (ledger := current_ledger()) is not None:
            ledger.release(tensor.untyped_storage()._cdata)

    def meter_all(self) -> None:
        """Report every buffer that is alive now (a ledger that starts later than the engine)."""
        for buffer in self._alive.values():
            self._meter(buffer, alive=True)
            for tensor in self._older[buffer.role]:
                self._hold(tensor, buffer)

    # ---- filling --------------------------------------------------------------------------------------------------

    def adopt(self, full32: Tensor) -> None:
        """Fill the flat buffers from ``full32``, all of the group in fp32, then let the parameters view them."""
        shard32 = self._own_slice(full32)
        if "master" in self.tensors and self.files is None:
            self.tensors["master"].copy_(shard32[: self.tensors["master"].numel()])
        if "host_update" in self.tensors:
            self.tensors["host_update"].copy_(shard32[: self.tensors["host_update"].numel()])
        if self.files is not None:
            self.files.adopt(self, shard32)
        if "device_master" in self.tensors:
            self.tensors["device_master"].copy_(shard32[-self.tensors["device_master"].numel() :])
        kept = self.tensors.get("kept_params")
        if kept is not None:
            kept.copy_(shard32 if kept.numel() == self.group.shard_numel else full32)
            full = torch.empty(self.group.padded_numel, dtype=self.dtype, device=self.device)
            self.tensors["full_params"] = full
        else:
            full = self.tensors["full_params"]
            full.copy_(full32)
        for slot, param in zip(self.slots, self.params, strict=True):
            param.data = cut(full, slot)
            if self.grad_dtype != self.dtype:
                param.grad_dtype = None  # any: autograd then adds its low-precision gradient to ours in place
        if kept is not None:
            full.untyped_storage().resize_(0)
        self._is_adopted = True

    def _point_grads(self, flat: Tensor) -> None:
        for slot, param in zip(self.slots, self.params, strict=True):
            param.grad = cut(flat, slot)

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
        shard = self.tensors.get("server_sum", self.tensors.get("grad_shard"))
        return self.own_full_grads if shard is None else shard

    @property
    def is_offloaded(self) -> bool:
        """Whether its parameters live in host memory."""
        return self.buffers.kept_params is not None and self.buffers.kept_params.place == "host"

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

    def ends_of(self, event: Copy) -> tuple[Tensor, Tensor]:
        """Source and target of a copy between device and host."""
        tensors = self.tensors
        if event.purpose == "params":
            return tensors["kept_params"], tensors["staging"] if "staging" in tensors else tensors["full_params"]
        if event.purpose == "grads":
            return self.reduced_grads[: tensors["host_grads"].numel()], tensors["host_grads"]
        if event.stream == "d2h":
            return tensors["full_params"], tensors["kept_params"]
        if self.is_offloaded:
            return self.step_params, self.own_full_params
        source = tensors.get("host_update", tensors.get("master"))
        assert source is not None
        return source, self.device_shard[: source.numel()]

    @property
    def master(self) -> Tensor:
        """Parameters that the optimizer steps; the model's own where those have the masters' dtype and place."""
        master = self.tensors.get("master")
        return self.step_params if master is None else master


def cut(flat: Tensor, slot: Slot) -> Tensor:
    """The parameter at ``slot`` as a view of ``flat``."""
    return flat[slot.offset : slot.offset + slot.param.numel].view(slot.param.shape)
