"""Parameter servers: what the first ``n_servers`` ranks do beside their own work (``estimator.schedule.servers``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from estimator.job.strategy import Strategy
from estimator.schedule.events import SumPieces
from estimator.schedule.servers import PUSH, grow_older
from runtime.comm import Communicator
from runtime.storage import GroupStorage


class Servers:
    """Pushes and pulls of one rank; sums, where it is a server."""

    def __init__(self, strategy: Strategy, comm: Communicator) -> None:
        self.n_servers, self.staleness, self.comm = strategy.n_servers, strategy.staleness, comm
        self.place, self.n_ranks = comm.mesh.data_place(comm.rank), comm.mesh.n_data
        self._to_come = strategy.staleness

    @property
    def is_starting(self) -> bool:
        """Whether no gradients are old enough yet: steps end without an update."""
        return self._to_come > 0

    def push(self, s: GroupStorage) -> Any:
        """Every server's slice of this step's gradients goes to it."""
        grads, received = s.tensors["full_grads"], s.tensors.get("received")
        slices = grads.view(self.n_servers, -1)
        sends = [(slices[i], i) for i in self._others(self.n_servers)]
        receives = (
            [] if received is None else list(zip(self._pieces(received), self._others(self.n_ranks), strict=True))
        )
        return self.comm.exchange("push", grads, sends, receives, "reduce")

    def pull(self, full: Tensor, *, counts: bool = True) -> Any:
        """``full`` becomes what the servers hold of it."""
        slices = full.view(self.n_servers, -1)
        receives = [(slices[i], i) for i in self._others(self.n_servers)]
        sends = [(slices[self.place], i) for i in self._others(self.n_ranks)] if self.place < self.n_servers else []
        return self.comm.exchange("pull", full, sends, receives, "gather", counts=counts)

    def sum(self, event: SumPieces, s: GroupStorage) -> None:
        """What the oldest push has brought, in rank order; zero while nothing has been pushed so long ago."""
        total = s.tensors["server_sum"]
        if self.is_starting:
            total.zero_()
            return
        own = s.oldest("full_grads").view(self.n_servers, -1)[self.place]
        others = self._pieces(s.oldest("received")) if event.pieces > 1 else []
        pieces = [*others[: self.place], own, *others[self.place :]]
        total.copy_(pieces[0])
        for piece in pieces[1:]:
            total.add_(piece)

    def end_step(self, work: dict[tuple[str, int], Any]) -> None:
        """``work`` under way, by tag, is one step older."""
        grow_older(work, self.staleness)
        self._to_come = max(0, self._to_come - 1)

    def finish(self, work: dict[tuple[str, int], Any]) -> None:
        """Wait for the pushes among ``work``, which stay what later steps are updated with."""
        for tag, messages in work.items():
            if tag[0].startswith(PUSH) and messages is not None:
                messages.wait()
                work[tag] = None

    @torch.no_grad()
    def masters(self, s: GroupStorage) -> Tensor:
        """All of a group's masters. A collective call, in no step."""
        if not s.group.kind.trained or s.masters_dtype == s.dtype:
            return s.tensors["full_params"]
        full = torch.empty(s.group.padded_numel, dtype=s.masters_dtype, device=s.device)
        if "master" in s.tensors:
            full.view(self.n_servers, -1)[self.place].copy_(s.tensors["master"])
        if self.n_ranks > 1 and (messages := self.pull(full, counts=False)) is not None:
            messages.wait()
        return full

    def _pieces(self, received: Tensor) -> list[Tensor]:
        return list(received.view(self.n_ranks - 1, -1))

    def _others(self, n_ranks: int) -> list[int]:
        return [i for i in range(n_ranks) if i != self.place]
