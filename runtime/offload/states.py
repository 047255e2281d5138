"""The optimizer's masters and states in files, group by group through two places in host memory (``estimator.schedule.nvme``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from estimator.errors import InputError
from estimator.job.strategy import Strategy
from estimator.schedule.events import Copy
from estimator.schedule.nvme import N_SLOTS, record_bytes
from estimator.schedule.ranks import sharers
from runtime.context import has_data, managed_memory
from runtime.offload.direct import aligned_bytes
from runtime.offload.nvme import Done, StateFiles, Transfer, Version

if TYPE_CHECKING:
    from runtime.comm import Communicator
    from runtime.storage import GroupStorage


def slot_memory(n_bytes: int, host: torch.device, *, pinned: bool) -> Tensor:
    """uint8 memory that files can be read into; tensors without data have no address to align."""
    plain = torch.empty(0, dtype=torch.uint8, device=host)
    return aligned_bytes(n_bytes, pinned=pinned) if has_data(plain) else plain.new_empty(n_bytes)


@dataclass(frozen=True, kw_only=True)
class NvmePlace:
    """Where an optimizer's files are."""

    folder: Path
    """Every rank has a folder of its own there."""
    resume: bool = False
    """Go on from the last whole version in it, instead of starting one from the model's parameters."""


def open_states(
    storages: Sequence[GroupStorage], strategy: Strategy, place: NvmePlace | None, rank: int, *, is_real: bool
) -> NvmeStates | None:
    """The files of ``rank`` if ``strategy`` has the optimizer in files; tensors without data (not ``is_real``) need none.

    Raises ``InputError`` where ``place`` does not fit the strategy, or as ``StateFiles``.
    """
    if place is not None and not strategy.offload_nvme:
        raise InputError(
            f"nvme is given with offload {strategy.offload!r}; allowed: only with offload 'optimizer:nvme'"
        )
    if not strategy.offload_nvme:
        return None
    if is_real and place is None:
        raise InputError("nvme is not given; offload 'optimizer:nvme' needs a folder for the optimizer's files")
    resume = place is not None and place.resume
    folder = place.folder / f"rank{rank}" if place is not None and is_real else None
    return NvmeStates(storages, strategy, folder, resume=resume)


class NvmeStates:
    """Obeys the program's copies between host and files for one rank's groups.

    While a group is in a slot, its storage's ``master`` and states are views of that.
    """

    def __init__(
        self, storages: Sequence[GroupStorage], strategy: Strategy, folder: Path | None, *, resume: bool
    ) -> None:
        """``folder``: this rank's own, ``None`` for tensors without data. Raises ``InputError`` (``StateFiles``)."""
        self._storages = [s for s in storages if s.group.kind.trained]
        self._record_of = {s.group.number: i for i, s in enumerate(self._storages)}
        self._sizes = [record_bytes(s.group, strategy) for s in self._storages]
        self.files = None if folder is None else StateFiles(folder, self._sizes, resume=resume)
        self.resumed: Version | None = self.files.version if self.files is not None and resume else None
        self._before_read: list[Done] = []
        for storage in self._storages:
            storage.files = self

    # ---- the program's events -------------------------------------------------------------------------------------

    def copy(self, event: Copy) -> Transfer | None:
        """Start a group's way between its slot and the files."""
        record = self._record_of[event.group]
        assert self._sizes[record] == event.n_bytes
        if event.stream == "nvme_read":
            self._bind(record)
            after, self._before_read = self._before_read, []
            return None if self.files is None else self.files.read(record, self._place(record), after)
        return None if self.files is None else self.files.write(record, self._place(record))

    def read_after(self, work: Any) -> None:
        """The next read begins when ``work`` (of another copy) is done."""
        if work is not None:
            self._before_read.append(work.wait if isinstance(work, Transfer) else work.synchronize)

    def commit(self, steps: Tensor) -> None:
        """All groups have been written: they are the newest version, that of so many optimizer steps (one element)."""
        if self.files is not None:
            self.files.commit({"steps": int(steps.item())})

    def start_step(self) -> None:
        """Forget the copies of the past."""
        if self.files is not None:
            self.files.start_step()

    def seconds(self) -> dict[str, float]:
        """Seconds since ``start_step`` in which something was read, and in which something was written."""
        return {} if self.files is None else self.files.seconds()

    # ---- outside of steps -----------------------------------------------------------------------------------------

    def adopt(self, storage: GroupStorage, shard32: Tensor) -> None:
        """Write a group's first version: masters from ``shard32``, states zero. The last group's makes it whole."""
        if self.files is None or self.resumed is not None:
            return
        record = self._record_of[storage.group.number]
        self._bind(record)
        self._place(record).zero_()
        storage.tensors["master"].copy_(shard32)
        self.files.write(record, self._place(record)).wait()
        if len(self.files.pending) == len(self._storages):
            self.files.commit({"steps": 0})

    def masters(self, storage: GroupStorage) -> Tensor:
        """fp32 parameters of the rank's shard in the last whole version, read into memory of their own."""
        numel, record = storage.group.shard_numel, self._record_of[storage.group.number]
        with managed_memory():
            if self.files is None:
                return torch.empty(numel, device=storage.host)
            memory = aligned_bytes(self._sizes[record])
            self.files.read(record, memory).wait()
            return memory.view(torch.float32)[:numel]

    @torch.no_grad()
    def restore(self, comm: Communicator, ep: int) -> int:
        """Fill the parameters from the last version that every rank holds whole; the optimizer steps that made it. A collective
        call."""
        assert self.files is not None and self.resumed is not None
        newest = torch.tensor([self.resumed.number])
        if comm.size > 1:
            torch.distributed.all_reduce(newest, torch.distributed.ReduceOp.MIN)
        self.files.roll_back(int(newest.item()))
        for storage in self._storages:
            shard = self.masters(storage).to(storage.device, storage.dtype)
            kept = storage.tensors.get("kept_params")
            if kept is not None:
                kept.copy_(shard)
            elif storage.group.n_shards == 1:
                storage.tensors["full_params"].copy_(shard)
            else:
                comm.gather_now(
                    storage.tensors["full_params"], shard.contiguous(), sharers(storage.group, comm.mesh, ep)
                )
        assert self.files.version is not None
        return int(self.files.version.note["steps"])

    @property
    def access(self) -> str:
        """How the files are accessed, and on what kind of file system; empty without files."""
        return "" if self.files is None else self.files.kind

    def close(self) -> None:
        if self.files is not None:
            self.files.close()

    # ---- help -----------------------------------------------------------------------------------------------------

    def _place(self, record: int) -> Tensor:
        """The slot's bytes that ``record`` takes."""
        role = f"slot_{record % N_SLOTS}"
        owner = next(s for s in self._storages if role in s.tensors)
        return owner.tensors[role][: self._sizes[record]]

    def _bind(self, record: int) -> None:
        """Let the record's storage, and no other, see the slot."""
        storage, fp32 = self._storages[record], self._place(record).view(torch.float32)
        roles = ["master", *(b.role for b in storage.buffers.optimizer_states)]
        for other in self._storages[record % N_SLOTS :: N_SLOTS]:
            for role in roles:
                other.tensors.pop(role, None)
        numel = storage.group.shard_numel
        for i, role in enumerate(roles):
            storage.tensors[role] = fp32[i * numel : (i + 1) * numel]
