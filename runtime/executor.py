"""``Executor``: obeys a ``StepProgram``, event by event, as the model's passes reach its ``Compute`` events.

Everything between two ``Compute`` events (fetches, reductions, waits, frees) is done in the program's order; the model
itself runs the ``Compute`` events. If the model runs its units in another order than the program, that is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from estimator.job.strategy import Strategy
from estimator.schedule.activations import AWAY, HERE
from estimator.schedule.buffers import takes_fused_step
from estimator.schedule.events import (
    Accumulate,
    AddRows,
    Alloc,
    Blend,
    Collective,
    Commit,
    Compute,
    Copy,
    Event,
    Free,
    GradNorm,
    Keep,
    Pack,
    PickRows,
    Recv,
    Section,
    Send,
    Sent,
    SumPieces,
    Unpack,
    Update,
    Wait,
)
from runtime import compress
from runtime.comm import Communicator
from runtime.compress import rows
from runtime.compress.frozen import FrozenAdam, still_where_nothing_came
from runtime.context import current_ledger, has_data, managed_memory
from runtime.kernels.grad_norm import squares
from runtime.kernels.optimizer import optimizer_step
from runtime.kernels.rules import Control
from runtime.offload.activations import BlockInputs
from runtime.offload.delayed import LateSteps
from runtime.offload.nvme import Transfer
from runtime.offload.split import device_part, whole_shard
from runtime.offload.states import NvmeStates
from runtime.optimizer import OptimizerConfig, Shard, rule_of, squared_norm, step_shard, update
from runtime.parallel.servers import Servers
from runtime.param_groups import Coefficients, Piece, cut_shard
from runtime.parts import EXCHANGE_PART, WAIT_PART, PartClock
from runtime.passes import begin_pass, between_passes, end_pass
from runtime.storage import GroupStorage
from runtime.streams import SideStreams

if TYPE_CHECKING:
    from runtime.parallel.pipeline import Peers


class Executor:
    """Runs the events of one rank on its groups' storage.

    ``parts`` is told of every wait, by part of ``estimator.report.TIME_PARTS``.
    """

    def __init__(
        self, storages: list[GroupStorage], unit_names: list[str], strategy: Strategy, comm: Communicator,
        optimizer: OptimizerConfig, device: torch.device, kernels: frozenset[str],
    ) -> None:  # fmt: skip
        """``kernels``: names of those in use on ``device``; plain torch does the work of the others, and all work on the host."""
        self.storages, self.unit_names, self.strategy, self.comm = storages, unit_names, strategy, comm
        self.optimizer, self.device = optimizer, device
        self._offloads = strategy.offload_optimizer
        self._fused_norm = "grad_norm" in kernels
        self._fused_step = takes_fused_step(strategy, kernels)
        self.streams = SideStreams(device)
        self.parts = PartClock(device)
        self.lr = optimizer.lr
        self.inputs = BlockInputs((), device)
        """Blocks' inputs that wait in host memory."""
        self.servers = Servers(strategy, comm) if strategy.has_servers else None
        self.peers: Peers | None = None
        """Obeys what a pipeline rank sends and receives."""
        self.nvme: NvmeStates | None = None
        """Obeys the copies between host and files, where masters and states are in files."""
        self.pieces: list[list[Piece]] | None = None
        """By group, where parameters are stepped with different coefficients (``runtime.param_groups``)."""
        places = {"host": storages[0].host} if self._offloads else {"compute": device}
        if any(s.buffers.device_part is not None for s in storages):
            places["compute"] = device
        self._step_counts = {stream: torch.zeros(1, device=place) for stream, place in places.items()}
        """fp32, wherever the optimizer steps, by stream; steps that were skipped are not counted."""
        self._frozen: dict[str, FrozenAdam] = {}
        """By stream, where the second moment is frozen."""
        self._decided: tuple[Tensor | None, Tensor | None] = (None, None)
        self._controls: dict[str, Control] = {}
        self._late = LateSteps(storages, strategy.optimizer, optimizer) if strategy.delayed_update else None
        self.norm_squared: Tensor | None = None
        """fp32 ``[1]`` on ``device``: the sum of squares of this step's gradients, while the optimizer section runs."""
        self.copy_bytes: Counter[str] = Counter()
        self._converters: dict[type, Any] = {
            Pack: compress.pack, Unpack: compress.unpack, PickRows: rows.pick, AddRows: rows.add
        }  # fmt: skip
        if self.servers is not None:
            self._converters[SumPieces] = self.servers.sum
        self._work: dict[tuple[str, int], Any] = {}
        self._events: tuple[Event, ...] = ()
        self._cursor = 0
        self._entered: Compute | None = None
        self.entered: Compute | None = None
        """The pass that the model has reached last."""
        self._handlers: dict[type, Any] = {
            Alloc: self._alloc, Free: self._free, Collective: self._collective, Copy: self._copy, Wait: self._wait,
            Keep: self._keep, Blend: self._blend, **dict.fromkeys(self._converters, self._convert),
            Accumulate: self._accumulate, GradNorm: self._grad_norm, Update: self._update,
            Send: self._send, Sent: self._sent, Recv: self._recv, Commit: self._commit,
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
        if self.nvme is not None:
            self.nvme.start_step()

    def copy_seconds(self) -> dict[str, float]:
        """Seconds by direction for which copies since ``start_step`` occupied their streams; waits for those of a GPU."""
        return self.streams.copy_seconds() | (self.nvme.seconds() if self.nvme is not None else {})

    def resume(self, steps: int) -> None:
        """``steps`` have been taken before."""
        for count in self._step_counts.values():
            count.fill_(steps)

    @torch.no_grad()
    def freeze_variance(self) -> None:
        """From the next step on Adam's second moment stays as it is."""
        given = self.strategy.compresses_momentum
        with managed_memory():
            for stream, count in self._step_counts.items():
                self._frozen[stream] = FrozenAdam(count.clone(), given_momentum=given)
            for storage in self.storages:
                for role in {"optimizer_state_1", "device_state_1"} & storage.tensors.keys():
                    still_where_nothing_came(storage.tensors[role])

    def start_late_steps(self, events: tuple[Event, ...]) -> None:
        """Obey the section of a delayed update, where gradients of a step before are still to be stepped."""
        if self._late is not None and self._late.due:
            self.run_all(events)
            self._late.due = False

    def finish_late_steps(self) -> None:
        """Wait for the late steps that have been started, and for late pushes."""
        for work in self._work.values():
            if isinstance(work, Future):
                work.result()
        if self.servers is not None:
            self.servers.finish(self._work)

    @staticmethod
    def norm_end(events: tuple[Event, ...]) -> int:
        """Index in the optimizer section after which the global gradient norm is known."""
        norm_events = [
            i for i, e in enumerate(events) if isinstance(e, GradNorm) or getattr(e, "tag", None) == ("grad_norm", -1)
        ]
        return norm_events[-1] + 1 if norm_events else 0

    @torch.no_grad()
    def begin_updates(self, factor: Tensor | None, skip: Tensor | None) -> None:
        """Before a step's first ``Update``: ``factor`` multiplies all gradients; where ``skip`` is 1 nothing is changed.

        Both fp32 ``[1]`` on the device, ``None``: 1 and 0. For an optimizer on the host they are read when it begins, which
        waits for them.
        """
        for count in self._step_counts.values() if not self._is_starting else ():
            count.add_(1)
        self._decided = factor, skip

    @property
    def _is_starting(self) -> bool:
        """Whether the first gradients are still under way, in pushes that servers may take late."""
        return self.servers is not None and self.servers.is_starting

    def _control_in(self, stream: str) -> Control:
        """What is decided for this step, where ``stream`` reads it."""
        if stream not in self._controls:
            count = self._step_counts[stream]
            factor, skip = (x if x is None else x.to(count.device) for x in self._decided)
            self._controls[stream] = Control(lr=self.lr, step=count, factor=factor, skip=skip)
        return self._controls[stream]

    @torch.no_grad()
    def end_updates(self) -> None:
        """After a step's last ``Update``."""
        if self._late is not None:
            self._late.remember(self._control_in("host"))
        skip = self._decided[1]
        for count in self._step_counts.values() if skip is not None else ():
            count.sub_(skip.to(count.device))  # type: ignore[union-attr]
        if self.servers is not None:
            self.servers.end_step(self._work)
        self._controls.clear()
        self.norm_squared = None

    @torch.no_grad()
    def _commit(self, _event: Commit) -> None:
        assert self.nvme is not None
        count, skip = self._step_counts["host"], self._decided[1]
        self.nvme.commit(count if skip is None else count - skip.to(count.device))

    def begin(self, section: Section) -> None:
        """Point at the start of a micro-batch."""
        assert self._cursor == len(self._events), "the previous micro-batch has not run its backward pass to the end"
        self._events, self._cursor, self._entered = section.events, 0, None

    def enter(self, unit: int, phase: str) -> None:
        """The model is about to run ``unit``'s pass: do all that the program puts before it."""
        self.advance()
        due = self._events[self._cursor] if self._cursor < len(self._events) else None
        if due != Compute(unit, phase):  # type: ignore[arg-type]
            said = (
                f"{due.phase} of {self.unit_names[due.unit]}"
                if isinstance(due, Compute)
                else "the end of the micro-batch"
            )
            raise RuntimeError(
                f"the model ran {phase} of {self.unit_names[unit]} where its program has {said}; every unit must run once in "
                "each pass, in the order in which the model lists them"
            )
        self._entered = self.entered = due  # type: ignore[assignment]
        self._cursor += 1
        begin_pass(due, self.unit_names[unit])  # type: ignore[arg-type]

    def leave(self, unit: int, phase: str) -> None:
        """``unit``'s pass is over: do what the program puts after it, up to the next unit's turn.

        After the last unit of a forward pass a loss may still be computed outside: what comes next waits for backward.
        """
        if self._entered != Compute(unit, phase):  # type: ignore[arg-type]
            return
        if phase != "backward":
            end_pass()
        if phase == "loss" and self.peers is None:
            self._entered = None
        else:
            self.advance()
        if phase != "backward":
            self._between_passes()

    def begin_forward(self) -> None:
        """A forward pass begins: do what the program puts before its first unit."""
        self.advance()
        self._between_passes()

    def _between_passes(self) -> None:
        if self.peers is None:
            due = self._events[self._cursor] if self._cursor < len(self._events) else None
            between_passes(due, self.unit_names)

    def finish(self) -> None:
        """The backward pass has returned: do what is left of the micro-batch."""
        self.advance()
        if self._cursor != len(self._events):
            due = self._events[self._cursor]
            assert isinstance(due, Compute)
            raise RuntimeError(f"the backward pass never reached {due.phase} of {self.unit_names[due.unit]}")

    def advance(self) -> None:
        """Do all that the program puts before the next pass, or before sending what is not there yet."""
        self._entered = None
        events, handlers = self._events, self._handlers
        while self._cursor < len(events):
            event = events[self._cursor]
            if type(event) is Compute or (type(event) is Send and self.peers.outgoing is None):  # type: ignore[union-attr]
                return
            self._cursor += 1
            handlers[type(event)](event)

    # ---- memory ---------------------------------------------------------------------------------------------------

    def _alloc(self, event: Alloc) -> None:
        if event.buffer.role == HERE:
            self.inputs.expect(event.buffer.group)
        elif event.buffer.role != AWAY:  # whose size is known when the first input has been met
            self.storages[event.buffer.group].alloc(event.buffer)

    def _free(self, event: Free) -> None:
        if event.buffer.role == HERE:
            self.inputs.drop(event.buffer.group)
        else:
            self.storages[event.buffer.group].free(event.buffer)

    # ---- communication and copies ---------------------------------------------------------------------------------

    @torch.no_grad()
    def _collective(self, event: Collective) -> None:
        with self.streams.on(event.stream), managed_memory():
            self._work[event.tag] = self._start_collective(event)

    def _start_collective(self, event: Collective) -> Any:
        if event.purpose == "grad_norm":
            if self.norm_squared is None:  # a rank that servers step for
                self.norm_squared = torch.zeros(1, device=self.device)
            return self.comm.all_reduce(self.norm_squared, event.span, event.stream)
        s = self.storages[event.group]
        if self.servers is not None:
            return self.servers.push(s) if event.op == "push" else self.servers.pull(s.tensors["full_params"])
        if event.ends is not None:
            source, target = (s.tensors[role] for role in event.ends)
            start = self.comm.all_gather if event.op == "all_gather" else self.comm.all_to_all
            return start(target, source, event.span)
        if event.tag[0] == "cross":
            full = s.reduced_grads
        else:
            full = s.tensors["full_grads" if event.purpose == "grads" else "full_params"]
        assert full.numel() * full.element_size() == event.n_bytes
        if event.op == "all_gather":
            kept = s.tensors.get("staging", s.tensors.get("kept_params"))
            shard = kept if event.purpose == "params" and kept is not None else s.own_full_params
            return self.comm.all_gather(full, shard, event.span)
        if event.op == "reduce_scatter":
            reduced = s.tensors.get("reduced", s.tensors.get("grad_shard"))
            return self.comm.reduce_scatter(s.own_full_grads if reduced is None else reduced, full, event.span)
        return self.comm.all_reduce(full, event.span)

    @torch.no_grad()
    def _copy(self, event: Copy) -> None:
        if event.purpose == "states":
            assert self.nvme is not None
            self.copy_bytes[event.stream] += event.n_bytes
            with managed_memory():
                self._work[event.tag] = self.nvme.copy(event)
            return
        if event.purpose == "activations":
            with self.parts.part("offload"):
                move = self.inputs.leave if event.stream == "d2h" else self.inputs.come_back
                n_bytes, self._work[event.tag] = move(event.group, self.streams)
            self.copy_bytes[event.stream] += n_bytes
            return
        source, target = self.storages[event.group].ends_of(event)
        assert source.numel() * source.element_size() == event.n_bytes
        self.copy_bytes[event.stream] += event.n_bytes
        with self.parts.part("offload"):
            self._work[event.tag] = self.streams.copy(event.stream, source, target)

    @torch.no_grad()
    def _send(self, event: Send) -> None:
        assert self.peers is not None
        with self.streams.on("send"):
            self._work[event.tag] = self.peers.send(event)

    def _sent(self, event: Sent) -> None:
        assert self.peers is not None
        self.peers.sent(event)

    @torch.no_grad()
    def _recv(self, event: Recv) -> None:
        assert self.peers is not None
        self._work[event.tag] = self.peers.recv(event, self.streams.on("recv"))

    def _wait(self, event: Wait) -> None:
        verb = event.tag[0].partition("@")[0]
        part = WAIT_PART.get(verb, "offload")
        # gloo keeps copies of its own, as NCCL has buffers: neither is the job's tensors
        with self.parts.part(part), managed_memory():
            work = self._work.get(event.tag)
            if self.nvme is not None and event.stream == "nvme_read":
                self.nvme.read_after(work)
            elif isinstance(work, Future):
                work.result()
            elif isinstance(work, Transfer):
                work.wait()
            else:
                self.streams.wait(event.stream, work)
            if verb in WAIT_PART:
                self._work.pop(event.tag, None)

    # ---- compression ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _convert(self, event: Pack | Unpack | PickRows | AddRows | SumPieces) -> None:
        """Into what is sent, or out of what has come."""
        with self.parts.part(EXCHANGE_PART[getattr(event, "purpose", "grads")]), managed_memory():
            self._converters[type(event)](event, self.storages[event.group])

    @torch.no_grad()
    def _blend(self, event: Blend) -> None:
        tensors, beta1 = self.storages[event.group].tensors, self.optimizer.betas[0]
        with self.parts.part("exposed_reduce"), managed_memory():
            tensors["full_grads"].add_(tensors["optimizer_state_0"], alpha=beta1 / (1 - beta1))

    @torch.no_grad()
    def _keep(self, event: Keep) -> None:
        tensors = self.storages[event.group].tensors
        kept = tensors["secondary_params"]
        start = self.comm.mesh.data_place(self.comm.rank) % self.strategy.secondary_shard * kept.numel()
        with self.parts.part("exposed_gather"), managed_memory():
            kept.copy_(tensors["full_params"][start : start + kept.numel()])

    # ---- arithmetic -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _accumulate(self, event: Accumulate) -> None:
        tensors = self.storages[event.group].tensors
        tensors["grad_shard"].add_(tensors["reduced"])

    @torch.no_grad()
    def _grad_norm(self, event: GradNorm) -> None:
        storage, on_host = self.storages[event.group], event.stream == "host"
        grads = storage.step_grads if on_host else storage.reduced_grads
        with self._part_of(event.stream), managed_memory():
            fused = self._fused_norm and not on_host
            square = squares([grads])[:1] if fused else squared_norm(grads).to(self.device).view(1)
            if event.copies > 1:
                square = square / event.copies
            self.norm_squared = square if self.norm_squared is None else self.norm_squared.add_(square)

    def _part_of(self, stream: str) -> AbstractContextManager[None]:
        """What the device does in a step that is the host's otherwise is told apart."""
        return self.parts.part("optimizer") if self._offloads and stream == "compute" else nullcontext()

    @torch.no_grad()
    def _update(self, event: Update) -> None:
        if self._late is not None:
            self._work["update", event.group] = self._late.start(event.group)
            return
        if self._is_starting:
            return
        ledger, on_host = current_ledger(), event.stream == "host"
        place = ledger.on_host() if ledger is not None and on_host else nullcontext()
        storage = self.storages[event.group]
        split = self._offloads and not on_host
        start = storage.group.shard_numel - event.numel if split else 0
        with place, self._part_of(event.stream), managed_memory():
            shard, control = device_part(storage) if split else whole_shard(storage), self._control_in(event.stream)
            for (lr_scale, weight_decay), spans in self._pieces_of(event, start):
                config = replace(self.optimizer, weight_decay=weight_decay)
                shards = [cut_shard(shard, span) for span in spans]
                self._step(shards, config, replace(control, lr=self.lr * lr_scale), on_host)

    def _pieces_of(self, event: Update, start: int) -> Iterator[tuple[Coefficients, list[slice]]]:
        """Coefficients, and the spans that have them of what ``event`` steps, which begins at ``start`` of the shard."""
        if self.pieces is None:
            yield Coefficients(1.0, self.optimizer.weight_decay), [slice(0, event.numel)]
            return
        for piece in self.pieces[event.group]:
            spans = piece.within(start, start + event.numel)
            if spans:
                yield piece.coefficients, spans

    def _step(self, shards: list[Shard], config: OptimizerConfig, control: Control, on_host: bool) -> None:
        kind = self.strategy.optimizer
        if self._fused_step and not on_host:
            if kind == "adamw8bit" and not has_data(shards[0].master):
                return  # all that its step makes is dropped again
            states = [list(of_all) for of_all in zip(*(shard.states for shard in shards), strict=True)]
            copies = [shard.target for shard in shards if shard.target is not None] or None
            optimizer_step(
                rule_of(kind, config), [s.master for s in shards], [s.grads for s in shards], states, control, copies
            )
            return
        assert control.step is not None and not isinstance(control.lr, Tensor)
        by = self._frozen.get("host" if on_host else "compute", update)
        for shard in shards:
            step_shard(kind, config, control.lr, control.step, control.factor, shard, control.skip, by)
