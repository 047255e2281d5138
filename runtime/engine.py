"""``initialize`` and ``Engine``: training with ZeRO 0-3 in three calls per micro-batch.

engine = runtime.initialize(model=model, strategy=Strategy(zero_stage=3), n_micro_batches=4)
for batch in batches:
    loss = engine(*batch)
    engine.backward(loss)
    engine.step()            # steps the optimizer when n_micro_batches have gone through
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from estimator.errors import InputError, require_int
from estimator.job.strategy import Strategy
from estimator.schedule.buffers import group_buffers
from estimator.schedule.events import Buffer
from estimator.schedule.program import build_program
from estimator.sharding.layout import Slot, make_layout
from runtime.comm import Communicator
from runtime.context import current_ledger, has_data
from runtime.executor import Executor
from runtime.ledger import Ledger
from runtime.optimizer import LossScaler, OptimizerConfig
from runtime.recompute import wrap_blocks
from runtime.storage import TORCH_DTYPES, Fill, GroupStorage
from runtime.units import LiveUnit, find_units


def initialize(
    *, model: nn.Module, strategy: Strategy, n_micro_batches: int = 1, optimizer: OptimizerConfig | None = None,
    fill: Fill | None = None,
) -> Engine:  # fmt: skip
    """Take over ``model`` (fp32, on the device to train on) and return the engine that trains it.

    Uses torch.distributed's default group when there is one, else a single process. The model's parameters become views
    of flat buffers in ``strategy.dtype``. With ``fill`` their values are not taken from the model, which may be hollow
    (``runtime.hollow``), but written group by group, in the order of ``model.named_parameters()``. Raises ``InputError``
    for what the runtime cannot do.
    """
    require_int("n_micro_batches", n_micro_batches)
    for axis in ("tp", "pp", "cp", "ep"):
        if getattr(strategy, axis) > 1:
            raise InputError(f"{axis} is {getattr(strategy, axis)}; the runtime is data parallel only, allowed: 1")
    return Engine(model, strategy, n_micro_batches, optimizer or OptimizerConfig(), fill)


class Engine:
    """Trains one model with one ``StepProgram``. Made by ``initialize``."""

    def __init__(
        self, model: nn.Module, strategy: Strategy, n_micro_batches: int, optimizer: OptimizerConfig,
        fill: Fill | None = None,
    ) -> None:  # fmt: skip
        self.model, self.strategy, self.n_micro_batches = model, strategy, n_micro_batches
        self.comm = Communicator()
        self.zero_stage = strategy.zero_stage if self.comm.size > 1 else 0
        self.scaler = LossScaler(strategy.dtype)
        self.grad_norm: Tensor | None = None
        """Global gradient norm of the last step, before clipping; ``None`` when neither clipping nor fp16 asked for it."""
        live = find_units(model)
        self.layout = make_layout([u.unit for u in live], strategy, self.zero_stage, self.comm.size)
        self.program = build_program(self.layout, strategy, self.zero_stage, self.comm.size, n_micro_batches)
        self.device = live[0].params[0].device
        self.storages = self._make_storages(live)
        self.executor = Executor(
            self.storages, [u.unit.name for u in live], strategy, self.comm, optimizer, self.device
        )  # fmt: skip
        self.executor.run_all(self.program.init)
        for storage in self.storages:
            storage.adopt_parameters([self._name_of(slot) for slot in storage.slots], fill)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(TORCH_DTYPES[strategy.dtype])
        self.recompute_clock = wrap_blocks([u.module for u in live[1:-1]], strategy.recompute, self.executor.parts)
        self._hook(live)
        self._micro_sections = [s for s in self.program.step if s.name == "micro_batch" for _ in range(s.repeat)]
        self._micro_batch = 0
        self._awaits = "forward"

    def _make_storages(self, live: list[LiveUnit]) -> list[GroupStorage]:
        storages = []
        for group in self.layout.groups:
            params = [p for unit in group.units for p in live[unit].params]
            buffers = group_buffers(group, self.strategy, self.zero_stage)
            slots = list(self.layout.slots(group))
            storages.append(
                GroupStorage(group, buffers, slots, params, self.strategy.dtype, self.device, self.comm.rank)
            )
        return storages

    def _hook(self, live: list[LiveUnit]) -> None:
        for index, (module, _, params) in enumerate(live):
            phase = "loss" if index == len(live) - 1 else "forward"
            module.register_forward_pre_hook(self._before_forward(index, phase))
            module.register_forward_hook(self._after_forward(index, phase))
            trained = [p for p in params if p.requires_grad]
            left = [0]
            for param in trained:
                param.register_post_accumulate_grad_hook(self._after_grad(index, len(trained), left))

    def _before_forward(self, unit: int, phase: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if torch.is_grad_enabled() and not self.recompute_clock.active:
                self.executor.enter(unit, phase)

        return hook

    def _after_forward(self, unit: int, phase: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if torch.is_grad_enabled() and not self.recompute_clock.active:
                tensor = output if isinstance(output, Tensor) else next(x for x in output if isinstance(x, Tensor))
                tensor.register_hook(lambda _: self.executor.enter(unit, "backward"))
                self.executor.leave(unit, phase)

        return hook

    def _after_grad(self, unit: int, n_params: int, left: list[int]) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            left[0] += 1
            if left[0] == n_params:
                left[0] = 0
                self.executor.leave(unit, "backward")

        return hook

    # ---- the three calls ------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of one micro-batch. Returns what the model returns."""
        self._expect("forward")
        if self._micro_batch == 0:
            self._start_step()
        with self.executor.parts.part("forward"):
            self.executor.begin(self._micro_sections[self._micro_batch])
            output = self.model(*args, **kwargs)
        self._awaits = "backward"
        return output

    def backward(self, loss: Tensor) -> None:
        """Backward pass of the micro-batch; ``loss`` (a scalar) is averaged over micro-batches and ranks."""
        self._expect("backward")
        with self.executor.parts.part("backward"):
            (loss * (self.scaler.scale / self.n_micro_batches)).backward()
            self.executor.finish()
        self._awaits = "step"

    def step(self) -> bool:
        """Optimizer step if this was the last micro-batch of its step; True when parameters were updated."""
        self._expect("step")
        self._awaits = "forward"
        self._micro_batch += 1
        if self._micro_batch < self.n_micro_batches:
            return False
        self._micro_batch = 0
        with self.executor.parts.part("offload" if self.strategy.offload_optimizer else "optimizer"):
            return self._optimize()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the last step by part of ``estimator.report.TIME_PARTS``; what is in none is not counted.

        On a GPU: of the compute stream, and reading it waits for the device.
        """
        return {"recompute": 0.0, **self.executor.parts.read()}

    def _start_step(self) -> None:
        self.comm.start_step()
        self.executor.start_step()

    def _optimize(self) -> bool:
        ledger, executor = current_ledger(), self.executor
        if ledger is not None:
            ledger.enter("optimizer", "optimizer step")
        executor.norm_squared = None
        executor.step_count += 1
        events = self.program.step[-1].events
        split = executor.norm_end(events)
        executor.run_all(events[:split])
        overflow = self._set_factor()
        executor.skip_update = overflow
        executor.step_count -= overflow
        executor.run_all(events[split:])
        self.scaler.record(overflow)
        return not overflow

    def _set_factor(self) -> bool:
        """From the norm: the factor on every gradient (mean over ranks, unscaling, clipping), and whether fp16 overflowed."""
        inverse = 1.0 / (self.comm.size * self.scaler.scale)
        square = self.executor.norm_squared
        self.grad_norm = None if square is None else square.sqrt() * inverse
        self.executor.grad_factor = inverse
        if self.grad_norm is not None and self.strategy.grad_clip > 0:
            clip = (self.strategy.grad_clip / (self.grad_norm + 1e-6)).clamp(max=1.0)
            self.executor.grad_factor = clip * inverse
        if not self.scaler.enabled:
            return False
        assert self.grad_norm is not None
        finite = torch.isfinite(self.grad_norm)
        return has_data(finite) and not bool(finite)

    def meter_tables(self, ledger: Ledger) -> None:
        """Report to ``ledger`` what lives beside the groups' buffers: the model's own (rotary tables) and scalars of the last step."""
        for buffer in self.model.buffers():
            storage = buffer.untyped_storage()
            ledger.hold(storage._cdata, Buffer("table", -1, "workspace", storage.nbytes()), storage)
        for scalar in (self.grad_norm, self.executor.grad_factor):
            if isinstance(scalar, Tensor):
                ledger.adopt(scalar, "temporaries")

    # ---- help -----------------------------------------------------------------------------------------------------

    def set_lr(self, lr: float) -> None:
        """Learning rate from the next step on (warm-up and decay schedules call this)."""
        self.executor.lr = lr

    @torch.no_grad()
    def full_parameters(self) -> dict[str, Tensor]:
        """All parameters by name, gathered from every rank, as fp32 masters where there are any. A collective call."""
        named: dict[str, Tensor] = {}
        for storage in self.storages:
            shard = storage.master.to(self.device)
            full = torch.empty(storage.group.padded_numel, dtype=shard.dtype, device=self.device)
            if full.numel() == shard.numel():
                full = shard
            else:
                self.comm.gather_now(full, shard.contiguous())
            for slot in storage.slots:
                values = full[slot.offset : slot.offset + slot.param.numel].view(slot.param.shape)
                named[self._name_of(slot)] = values.clone()
        return named

    def _name_of(self, slot: Slot) -> str:
        """The parameter's name in the model."""
        return f"{self.layout.units[slot.unit].name}.{slot.param.name}"

    def _expect(self, call: str) -> None:
        if self._awaits != call:
            raise RuntimeError(f"engine.{call} was called where engine.{self._awaits} is due")
