"""``Executor``: obeys a ``StepProgram``, event by event, as the model's passes reach its ``Compute`` events.

Everything between two ``Compute`` events (fetches, reductions, waits, frees) is done in the program's order; the model
itself runs the ``Compute`` events. If the model runs its units in another order than the program, that is an error.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from estimator.job.strategy import Strategy
from estimator.schedule.events import (
    Accumulate,
    Alloc,
    Collective,
    Compute,
    Copy,
    Event,
    Free,
    GradNorm,
    Section,
    Update,
    Wait,
)
from runtime.comm import Communicator
from runtime.context import current_ledger, managed_memory
from runtime.optimizer import OptimizerConfig, Shard, squared_norm, step_shard
from runtime.parts import PartClock
from runtime.storage import GroupStorage
from runtime.streams import SideStreams

_WAIT_PART = {"gather": "exposed_gather", "reduce": "exposed_reduce", "grad_norm": "exposed_other_comm"}


class Executor:
    """Runs the events of one rank on its groups' storage.

    ``parts`` is told of every wait, by part of ``estimator.report.TIME_PARTS``.
    """

    def __init__(
        self, storages: list[GroupStorage], unit_names: list[str], strategy: Strategy, comm: Communicator,
        optimizer: OptimizerConfig, device: torch.device,
    ) -> None:  # fmt: skip
        self.storages, self.unit_names, self.strategy, self.comm = storages, unit_names, strategy, comm
        self.optimizer, self.device = optimizer, device
        self.streams = SideStreams(device)
        self.parts = PartClock(device)
        self.lr = optimizer.lr
        self.step_count = 0
        self.grad_factor: float | Tensor = 1.0
        self.skip_update = False
        self.norm_squared: Tensor | None = None
        self.copy_bytes: Counter[str] = Counter()
        self._work: dict[tuple[str, int], Any] = {}
        self._events: tuple[Event, ...] = ()
        self._cursor = 0
        self._entered: Compute | None = None
        self._handlers: dict[type, Any] = {
            Alloc: self._alloc, Free: self._free, Collective: self._collective, Copy: self._copy, Wait: self._wait,
            Accumulate: self._accumulate, GradNorm: self._grad_norm, Update: self._update,
        }  # fmt: skip

    # ---- walking the program --------------------------------------------------------------------------------------

    def run_all(self, events: tuple[Event, ...]) -> None:
        """Obey events among which no unit computes (``init``, the optimizer section)."""
        for event in events:
            self._handlers[type(event)](event)

    def start_step(self) -> None:
        """Start counting anew."""
        self.parts.start()
        self.streams.start_step()
        self.copy_bytes.clear()

    @staticmethod
    def norm_end(events: tuple[Event, ...]) -> int:
        """Index in the optimizer section after which the global gradient norm is known."""
        norm_events = [
            i for i, e in enumerate(events) if isinstance(e, GradNorm) or getattr(e, "tag", None) == ("grad_norm", -1)
        ]
        return norm_events[-1] + 1 if norm_events else 0

    def begin(self, section: Section) -> None:
        """Point at the start of a micro-batch."""
        assert self._cursor == len(self._events), "the previous micro-batch has not run its backward pass to the end"
        self._events, self._cursor, self._entered = section.events, 0, None

    def enter(self, unit: int, phase: str) -> None:
        """The model is about to run ``unit``'s pass: do all that the program puts before it."""
        self._advance()
        due = self._events[self._cursor] if self._cursor < len(self._events) else None
        if due != Compute(unit, phase):  # type: ignore[arg-type]
            said = (
                f"{due.phase} of {self.unit_names[due.unit]}"
                if isinstance(due, Compute)
                else "the end of the micro-batch"
            )
            raise RuntimeError(f"the model ran {phase} of {self.unit_names[unit]} where its program has {said}")
        self._entered = due  # type: ignore[assignment]
        self._cursor += 1
        ledger = current_ledger()
        if ledger is not None:
            ledger.enter(phase, f"{phase} of {self.unit_names[unit]}")
            if phase != "backward":
                ledger.open_scope()

    def leave(self, unit: int, phase: str) -> None:
        """``unit``'s pass is over: do what the program puts after it, up to the next unit's turn."""
        if self._entered == Compute(unit, phase):  # type: ignore[arg-type]
            ledger = current_ledger()
            if ledger is not None and phase != "backward":
                ledger.close_scope()
            self._advance()

    def finish(self) -> None:
        """The backward pass has returned: do what is left of the micro-batch."""
        self._advance()
        if self._cursor != len(self._events):
            due = self._events[self._cursor]
            assert isinstance(due, Compute)
            raise RuntimeError(f"the backward pass never reached {due.phase} of {self.unit_names[due.unit]}")

    def _advance(self) -> None:
        self._entered = None
        events, handlers = self._events, self._handlers
        while self._cursor < len(events):
            event = events[self._cursor]
            if type(event) is Compute:
                return
            self._cursor += 1
            handlers[type(event)](event)

    # ---- memory ---------------------------------------------------------------------------------------------------

    def _alloc(self, event: Alloc) -> None:
        self.storages[event.buffer.group].alloc(event.buffer)

    def _free(self, event: Free) -> None:
        self.storages[event.buffer.group].free(event.buffer)

    # ---- communication and copies ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _collective(self, event: Collective) -> None:
        with self.streams.on(event.stream), managed_memory():
            self._work[event.tag] = self._start_collective(event)

    def _start_collective(self, event: Collective) -> Any:
        if event.purpose == "grad_norm":
            assert self.norm_squared is not None
            return self.comm.all_reduce(self.norm_squared)
        s = self.storages[event.group]
        full = s.tensors["full_grads" if event.purpose == "grads" else "full_params"]
        assert full.numel() * full.element_size() == event.n_bytes
        if event.op == "all_gather":
            kept = s.tensors.get("staging", s.tensors.get("kept_params"))
            shard = kept if event.purpose == "params" and kept is not None else s.own_full_params
            return self.comm.all_gather(full, shard)
        if event.op == "reduce_scatter":
            reduced = s.tensors.get("reduced", s.tensors.get("grad_shard"))
            return self.comm.reduce_scatter(s.own_full_grads if reduced is None else reduced, full)
        return self.comm.all_reduce(full)

    @torch.no_grad()
    def _copy(self, event: Copy) -> None:
        source, target = self._ends_of(event, self.storages[event.group])
        assert source.numel() * source.element_size() == event.n_bytes
        self.copy_bytes[event.stream] += event.n_bytes
        with self.parts.part("offload"):
            self._work[event.tag] = self.streams.copy(event.stream, source, target)

    def _ends_of(self, event: Copy, s: GroupStorage) -> tuple[Tensor, Tensor]:
        """Source and target of a copy."""
        tensors = s.tensors
        if event.purpose == "params":
            return tensors["kept_params"], tensors["staging"] if "staging" in tensors else tensors["full_params"]
        if event.purpose == "grads":
            return s.reduced_grads, tensors["host_grads"]
        if event.stream == "d2h":
            return tensors["full_params"], tensors["kept_params"]
        if self.strategy.offload_param:
            return s.step_params, s.own_full_params
        source = tensors.get("host_update", tensors.get("master"))
        assert source is not None
        return source, s.device_shard

    def _wait(self, event: Wait) -> None:
        part = _WAIT_PART.get(event.tag[0], "offload")
        # gloo keeps copies of its own, as NCCL has buffers: neither is the job's tensors
        with self.parts.part(part), managed_memory():
            self.streams.wait(event.stream, self._work.get(event.tag))
            if event.tag[0] in _WAIT_PART:
                self._work.pop(event.tag, None)

    # ---- arithmetic -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _accumulate(self, event: Accumulate) -> None:
        tensors = self.storages[event.group].tensors
        tensors["grad_shard"].add_(tensors["reduced"])

    @torch.no_grad()
    def _grad_norm(self, event: GradNorm) -> None:
        with managed_memory():
            square = squared_norm(self.storages[event.group].step_grads).to(self.device)
            self.norm_squared = square if self.norm_squared is None else self.norm_squared.add_(square)

    @torch.no_grad()
    def _update(self, event: Update) -> None:
        if self.skip_update:
            tensors = self.storages[event.group].tensors
            if "host_update" in tensors:
                tensors["host_update"].copy_(tensors["master"])
            return
        ledger = current_ledger()
        if ledger is not None and event.stream == "host":
            with ledger.on_host():
                self._step_group(self.storages[event.group])
        else:
            self._step_group(self.storages[event.group])

    def _step_group(self, s: GroupStorage) -> None:
        shard = Shard(
            master=s.master,
            grads=s.step_grads,
            states=[s.tensors[b.role] for b in s.buffers.optimizer_states],
            target=s.step_params if "master" in s.tensors else None,
            temp=s.tensors.get("update_temp"),
        )
        with managed_memory():
            device = shard.master.device
            step = torch.tensor(float(self.step_count), device=device)
            factor = self.grad_factor.to(device) if isinstance(self.grad_factor, Tensor) else self.grad_factor
            step_shard(self.strategy.optimizer, self.optimizer, self.lr, step, factor, shard)
