"""``initialize`` and ``Engine``: training with ZeRO 0-3 in three calls per micro-batch.

engine = runtime.initialize(model=model, strategy=Strategy(zero_stage=3), n_micro_batches=4)
for batch in batches:
    loss = engine(*batch)
    engine.backward(loss)
    engine.step()            # steps the optimizer when n_micro_batches have gone through
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from estimator.errors import InputError, require_int
from estimator.job.grouping import check_ranks
from estimator.job.kernels import KERNELS
from estimator.job.strategy import Strategy
from estimator.schedule.activations import InputCopies
from estimator.schedule.buffers import group_buffers, takes_fused_step
from estimator.schedule.events import Buffer, StepProgram
from estimator.schedule.program import build_program
from estimator.schedule.ranks import expert_spans, sharers
from estimator.schedule.reduction import warm_up
from estimator.schedule.servers import serving
from estimator.schedule.stages import PipelinePlace
from estimator.sharding.layout import Slot, make_layout
from estimator.sharding.units import recomputing
from runtime.adopt import adopt_parameters
from runtime.comm import Communicator
from runtime.compress.rows import mark_tables
from runtime.context import current_ledger, has_data, managed_memory
from runtime.executor import Executor
from runtime.faults import told
from runtime.functional import attending_by
from runtime.hooks import UnitHooks
from runtime.kernels.grad_norm import gradient_factor
from runtime.kernels.loader import device_has_kernels
from runtime.kernels.registry import enabled, switched_off
from runtime.ledger import Ledger
from runtime.models.stage import DecoderStage
from runtime.nonfinite import nonfinite_gradients
from runtime.offload.activations import BlockInputs
from runtime.offload.split import masters_of
from runtime.offload.states import NvmePlace, open_states
from runtime.optimizer import LossScaler, OptimizerConfig
from runtime.parallel.context import check_made_for
from runtime.parallel.experts import check_shared_by
from runtime.parallel.late import LateGradients
from runtime.parallel.layers import Fill, layers_of
from runtime.parallel.pipeline import PipelineRun, check_model, ends_of, mesh_of
from runtime.param_groups import ParamGroup, assign
from runtime.passes import end_pass
from runtime.recompute import wrap_blocks
from runtime.refusals import check_runs
from runtime.storage import TORCH_DTYPES, GroupStorage
from runtime.units import LiveUnit, find_units


def initialize(
    *, model: nn.Module, strategy: Strategy, n_micro_batches: int = 1, optimizer: OptimizerConfig | None = None,
    fill: Fill | None = None, param_groups: Sequence[ParamGroup] = (), nvme: NvmePlace | None = None,
    comm: Communicator | None = None, sparse_rows: Mapping[str, int] | None = None,
) -> Engine:  # fmt: skip
    """Take over ``model`` (fp32, on the device to train on) and return the engine that trains it.

    Uses torch.distributed's default group when there is one, else a single process. The model's parameters become views
    of flat buffers in ``strategy.dtype``. With ``fill`` their values are not taken from the model, which may be hollow
    (``runtime.hollow``), but written group by group, in the order of ``model.named_parameters()``. ``param_groups``:
    learning rates and weight decays by name. ``nvme``: for offload ``optimizer:nvme``, where the files are. ``comm``: the one
    that the model's own layers use, where ranks share them. ``sparse_rows``: with
    ``strategy.sparse_embeddings``, by name of an embedding's parameter, the rows that a micro-batch looks up at most. Raises
    ``InputError`` for what the runtime cannot do.
    """
    require_int("n_micro_batches", n_micro_batches)
    check_runs(model, strategy)
    comm = comm or Communicator(mesh_of(strategy))
    check_model(model, strategy, comm.mesh)
    layers = layers_of(model)
    check_shared_by(layers.experts, strategy)
    check_made_for(layers.context, strategy)
    if strategy.tp != layers.size:
        raise InputError(
            f"tp is {strategy.tp}; the model was made for {layers.size}, allowed: that, or a model made with "
            "layers = runtime.parallel.tensor.TensorParallel(...)"
        )
    if param_groups and strategy.optimizer == "adamw8bit":
        raise InputError("optimizer is 'adamw8bit' with param_groups, which cut its blocks; allowed: one of the two")
    if param_groups and strategy.delayed_update:
        raise InputError("delayed_update is on with param_groups; allowed: one of the two")
    mark_tables(model, sparse_rows or {}, wanted=strategy.sparse_embeddings)
    engine = Engine(model, strategy, n_micro_batches, optimizer or OptimizerConfig(), fill, nvme, comm)
    if param_groups:
        engine.set_param_groups(param_groups)
    return engine


class Engine:
    """Trains one model with one ``StepProgram``. Made by ``initialize``."""

    def __init__(
        self, model: nn.Module, strategy: Strategy, n_micro_batches: int, optimizer: OptimizerConfig,
        fill: Fill | None = None, nvme: NvmePlace | None = None, comm: Communicator | None = None,
    ) -> None:  # fmt: skip
        self.model, self.strategy, self.n_micro_batches = model, strategy, n_micro_batches
        self.comm, self.layers = comm or Communicator(), layers_of(model)
        mesh = self.comm.mesh
        check_ranks(strategy, mesh.n_data)
        self.zero_stage = strategy.zero_stage if mesh.n_data > 1 else 0
        self.grad_norm: Tensor | None = None
        """Global gradient norm of the last step, before clipping; ``None`` when neither clipping nor fp16 asked for it."""
        self.check_gradients = False
        """Whether every step looks for gradients that are not finite (the host waits for the device to know), skips the
        step when there are any, and names them in ``nonfinite_gradients``."""
        self.nonfinite_gradients: list[str] = []
        """Parameters whose gradient of the last step held a NaN or an infinity on any rank, if ``check_gradients``."""
        live = find_units(model)
        self.device = live[0].params[0].device
        self.kernels = self._kernels_in_use()
        stage = self.stage
        self.layout = make_layout(
            [u.unit for u in live], strategy, self.zero_stage, mesh.n_data, stage.chunks if stage is not None else ()
        )
        fused_step = takes_fused_step(strategy, self.kernels)
        self.program = build_program(
            self.layout, strategy, self.zero_stage, mesh, n_micro_batches, fused_step=fused_step, pipeline=stage,
            is_server=self.is_server,
        )  # fmt: skip
        exact = warm_up(strategy) if mesh.n_data > 1 else None
        self._warmup = build_program(self.layout, exact, self.zero_stage, mesh, n_micro_batches) if exact else None
        programs = [self.program, *([self._warmup] if self._warmup else [])]
        events = [event for program in programs for section in program.step for event in section.events]
        self.comm.join(events, ends_of(model, mesh), expert_spans(strategy, self.zero_stage, mesh))
        if stage is not None:
            self.comm.join_peers(mesh.span("pp").stride, is_ring=len(stage.chunks) > 1)
        self.storages = self._make_storages(live, fused_step)
        with managed_memory():
            self.scaler = LossScaler(strategy.dtype, self.device)
            self.executor = Executor(
                self.storages, [u.unit.name for u in live], strategy, self.comm, optimizer, self.device, self.kernels
            )  # fmt: skip
        is_real = has_data(live[0].params[0])
        self.nvme = self.executor.nvme = open_states(self.storages, strategy, nvme, self.comm.rank, is_real=is_real)
        self.executor.inputs = BlockInputs(InputCopies(self.layout.units, strategy).units, self.device)
        self.executor.run_all(self.program.init)
        adopt_parameters(self.storages, self.layout.units, fill, self.layers)
        if nvme is not None and nvme.resume:
            assert self.nvme is not None
            self.executor.resume(self.nvme.restore(self.comm, strategy.ep))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.to(TORCH_DTYPES[strategy.dtype])
        every = strategy.recompute_every
        again = model.recomputing(every) if isinstance(model, DecoderStage) else recomputing(self.layout.units, every)
        blocks = list(dict.fromkeys(live[i].module for i in sorted(again)))
        self.layers.time(self.executor.parts)
        self.recompute_clock = wrap_blocks(
            blocks, strategy.recompute, self.executor.parts, self.executor.inputs.keeping
        )
        has_loss = stage is None or stage.is_last
        self._hooks = UnitHooks(live, self.executor, self.recompute_clock, has_loss=has_loss)
        self._pipeline = PipelineRun(self, model) if isinstance(model, DecoderStage) else None
        self._obey(self._warmup or self.program)
        self._micro_batch = self._step = 0
        self._awaits = "forward"

    def _obey(self, program: StepProgram) -> None:
        """From the next step on."""
        self._step_events = program.step
        self._micro_sections = [s for s in program.step if s.name == "micro_batch" for _ in range(s.repeat)]

    def end_warmup(self) -> None:
        """From the next step on gradients are compressed, if the strategy says so; it is called after
        ``compression_warmup_steps`` steps in any case."""
        if self._warmup is not None:
            self._warmup = None
            self._obey(self.program)
            if self.strategy.freezes_variance:
                self.executor.freeze_variance()

    def _kernels_in_use(self) -> frozenset[str]:
        """Names of the ``runtime.kernels`` that work on this engine's device."""
        if not device_has_kernels(self.device):
            return frozenset()
        with self._switches():
            return frozenset(filter(enabled, KERNELS))

    @contextmanager
    def _switches(self) -> Iterator[None]:
        """Inside, the kernels that the strategy switches off are off, for the model too, which attends as the strategy says."""
        off = self.strategy.kernels_off
        with switched_off(*off) if off else nullcontext(), attending_by(self.strategy.attention):
            yield

    def _make_storages(self, live: list[LiveUnit], fused_step: bool) -> list[GroupStorage]:
        storages = []
        for group in self.layout.groups:
            role = serving(self.strategy, self.comm.mesh.n_data, self.is_server)
            buffers = group_buffers(group, self.strategy, self.zero_stage, fused_step=fused_step, serving=role)
            slots = list(self.layout.slots(group))
            params = [live[slot.unit].param(slot.param) for slot in slots]
            storages.append(
                GroupStorage(
                    group,
                    buffers,
                    slots,
                    params,
                    self.strategy,
                    self.device,
                    sharers(group, self.comm.mesh, self.strategy.ep).place(self.comm.rank),
                )
            )
        return storages

    # ---- the three calls ------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass of one micro-batch. Returns what the model returns."""
        self._expect("forward")
        if self._pipeline is not None:
            raise RuntimeError("a stage of a pipeline has no passes of its own; engine.train_step runs all of a step")
        if self._micro_batch == 0:
            self._start_step()
        with told(f"the forward pass of step {self._step}"), self.executor.parts.part("forward"), self._switches():
            self.executor.begin(self._micro_sections[self._micro_batch])
            self._hooks.begin()
            self.executor.begin_forward()
            output = self.model(*args, **kwargs)
        self._awaits = "backward"
        return output

    def train_step(self, batches: Sequence[tuple[Any, ...]]) -> list[Tensor]:
        """One whole step: forward and backward of all ``batches``, one for each micro-batch, and the optimizer's step.

        The only way to train a pipeline: each of its ranks is given ids and labels ``[B, S]`` of the same micro-batches, of
        which the first stage reads the ids, the last one the labels; what a stage does not read may be ``None``. Returns the
        losses, in a pipeline on its last stage alone.
        """
        self._expect("forward")
        if self._pipeline is None:
            losses = []
            for batch in batches:
                loss = self(*batch)
                self.backward(loss)
                losses.append(loss.detach())
                self.step()
            return losses
        self._pipeline.check(batches)
        self._start_step()
        with told(f"the passes of step {self._step}"), self._switches():
            losses = self._pipeline.run(batches)
        self._micro_batch, self._awaits = self.n_micro_batches - 1, "step"
        self.step()
        return losses

    @property
    def stage(self) -> PipelinePlace | None:
        """This rank's place in a pipeline, where there is one."""
        return self.model.stage if isinstance(self.model, DecoderStage) else None

    def loss_of_all(self, loss: Tensor | None) -> Tensor | None:
        """A loss that one rank of a pipeline has, on all of them; of parts of sequences the mean over these. A collective call, in
        no step."""
        mean = loss if loss is None else self.layers.context.mean(loss)
        return mean if self._pipeline is None else self._pipeline.share(mean)

    def begin_pass(self) -> None:
        """A micro-batch goes forward."""
        self._hooks.begin()

    def leave_weights(self) -> LateGradients:
        """From now on backward passes leave gradients of weights for later."""
        late = LateGradients(self.executor)
        self._hooks.backward, self.recompute_clock.around = "input_grad", late.linears
        return late

    def weighed(self, loss: Tensor) -> Tensor:
        """What backward begins with: ``loss`` averaged over micro-batches, and scaled."""
        with managed_memory():
            factor = self.scaler.factor / self.n_micro_batches
        return loss * factor

    def loss_gradient(self) -> Tensor:
        """The gradient with which backward begins, on the device: what ``weighed`` multiplies by."""
        with managed_memory():
            one = torch.ones((), device=self.device)
        return self.weighed(one)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of the micro-batch; ``loss`` (a scalar) is averaged over micro-batches and ranks."""
        self._expect("backward")
        with told(f"the backward pass of step {self._step}"), self.executor.parts.part("backward"), self._switches():
            scaled = self.weighed(loss)
            end_pass()
            scaled.backward()
            self.executor.finish()
        self._awaits = "step"

    def step(self) -> bool:
        """Optimizer step if this was the last micro-batch of its step; True when it was.

        A step whose gradients' norm is not finite changes nothing and is counted in ``skipped_steps``; the norm is taken
        when there is clipping or fp16. On a GPU the host does not wait to know.
        """
        self._expect("step")
        self._awaits = "forward"
        self._micro_batch += 1
        if self._micro_batch < self.n_micro_batches:
            return False
        self._micro_batch = 0
        part = "offload" if self.strategy.offload_optimizer else "optimizer"
        with told(f"the optimizer step of step {self._step}"), self.executor.parts.part(part), self._switches():
            self._optimize()
        self._step += 1
        return True

    @property
    def is_server(self) -> bool:
        """Whether this rank is a parameter server, where there are any."""
        return self.comm.mesh.data_place(self.comm.rank) < self.strategy.n_servers

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because a gradient was not finite; reading it waits for the device."""
        return self.scaler.skipped_steps

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of the last step by part of ``estimator.report.TIME_PARTS``; what is in none is not counted.

        On a GPU: of the compute stream, and reading it waits for the device.
        """
        return {"recompute": 0.0, **self.executor.parts.read()}

    def _start_step(self) -> None:
        if self._step == self.strategy.compression_warmup_steps:
            self.end_warmup()
        self.comm.start_step()
        self.executor.start_step()
        self.executor.start_late_steps(self.program.step[0].events)

    def _optimize(self) -> None:
        ledger, executor = current_ledger(), self.executor
        if ledger is not None:
            ledger.enter("optimizer", "optimizer step")
        events = self._step_events[-1].events
        split = executor.norm_end(events)
        executor.run_all(events[:split])
        with managed_memory(), torch.no_grad():
            overflow = self._decide(executor.norm_squared)
        executor.run_all(events[split:])
        with managed_memory(), torch.no_grad():
            executor.end_updates()
            if overflow is not None:
                self.scaler.record(overflow)

    def _decide(self, square: Tensor | None) -> Tensor | None:
        """From the sum of squares: one factor on every gradient (mean over ranks, unscaling, clipping), and whether the
        step is skipped (fp32 ``[1]``). All on the device, unless gradients are checked."""
        inverse = 1.0 / (self.scaler.factor * self.comm.mesh.n_data)
        if self.check_gradients:
            self.nonfinite_gradients = self._find_nonfinite(square)
        if square is None:
            assert isinstance(inverse, float)
            self.grad_norm = None
            factor = None if inverse == 1.0 else torch.full((1,), inverse, device=self.device)
            skip = torch.ones(1, device=self.device) if self.nonfinite_gradients else None
            self.executor.begin_updates(factor, skip)
            return skip
        self.grad_norm = (square.sqrt() * inverse).view(())
        overflow = square.isfinite().logical_not().float()
        self.executor.begin_updates(gradient_factor(square, inverse, self.strategy.grad_clip), overflow)
        return overflow

    def _find_nonfinite(self, square: Tensor | None) -> list[str]:
        trained = [storage for storage in self.storages if storage.group.kind.trained]
        if not has_data(trained[0].params[0]) or (square is not None and bool(square.isfinite())):
            return []
        if self.device.type == "cuda":  # gradients may still be on their way to the host
            torch.cuda.synchronize(self.device)
        names = [[self._name_of(slot) for slot in storage.slots] for storage in trained]
        return nonfinite_gradients(trained, names, self.comm, self.device)

    def meter_tables(self, ledger: Ledger) -> None:
        """Report to ``ledger`` what lives beside the groups' buffers: host memory of blocks' inputs, the model's own
        (rotary tables)."""
        self.executor.inputs.meter(ledger)
        for buffer in self.model.buffers():
            storage = buffer.untyped_storage()
            ledger.hold(storage._cdata, Buffer("table", -1, "workspace", storage.nbytes()), storage)

    # ---- help -----------------------------------------------------------------------------------------------------

    def set_param_groups(self, groups: Sequence[ParamGroup]) -> None:
        """From the next step on, what ``groups`` match is stepped with their coefficients. Raises ``InputError``."""
        names = [[self._name_of(slot) for slot in storage.slots] for storage in self.storages]
        self.executor.pieces = assign(self.storages, names, groups, self.executor.optimizer)

    def set_lr(self, lr: float) -> None:
        """Learning rate from the next step on (warm-up and decay schedules call this)."""
        self.executor.lr = lr

    @torch.no_grad()
    def full_parameters(self) -> dict[str, Tensor]:
        """All parameters by name, gathered from every rank, as fp32 masters where there are any: under a staleness without what
        the pushes of the last steps bring. A collective call."""
        named: dict[str, Tensor] = {}
        self.executor.start_late_steps(self.program.step[0].events)
        self.executor.finish_late_steps()
        for storage in self.storages:
            full = self._full_masters(storage)
            for slot in storage.slots:
                values = full[slot.offset : slot.offset + slot.param.numel].view(slot.param.shape)
                named[self._name_of(slot)] = self.layers.join(values.clone(), slot.param.split)
        return named if self._pipeline is None else self._pipeline.join(named)

    def _full_masters(self, storage: GroupStorage) -> Tensor:
        """All of a group, gathered from every rank."""
        if self.executor.servers is not None:
            return self.executor.servers.masters(storage)
        shard = masters_of(storage).to(self.device)
        if shard.numel() == storage.group.padded_numel:
            return shard
        full = torch.empty(storage.group.padded_numel, dtype=shard.dtype, device=self.device)
        self.comm.gather_now(full, shard.contiguous(), sharers(storage.group, self.comm.mesh, self.strategy.ep))
        return full

    def close(self) -> None:
        """Wait for pushes that are under way and give files back, if the optimizer has any; the engine cannot be used any more."""
        self.executor.finish_late_steps()
        if self.nvme is not None:
            self.nvme.close()

    def _name_of(self, slot: Slot) -> str:
        """The parameter's name in the model."""
        return f"{self.layout.units[slot.unit].name}.{slot.param.name}"

    def _expect(self, call: str) -> None:
        if self._awaits != call:
            raise RuntimeError(f"engine.{call} was called where engine.{self._awaits} is due")
