"""``trace``: one micro-batch of a module, forward and backward, without data, as records that the estimator forecasts from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from estimator.errors import InputError
from estimator.job.cluster import Gpu
from estimator.job.model import ModelSpec, traced_spec
from estimator.job.recompute import parts_of
from estimator.job.strategy import Strategy
from estimator.job.traced import Held, Traced, TracedCost, TracedOp, TracedParam, TracedPass, TracedUnit
from runtime.context import input_memory, metered_by
from runtime.engine import Engine, initialize
from runtime.ledger import Ledger
from runtime.session import kernels_for
from runtime.storage import TORCH_DTYPES
from runtime.tracing.as_gpu import as_gpu
from runtime.tracing.copies import first_line, like_batch, without_data
from runtime.tracing.recorder import Recorder

_SAMPLES = "a sample of the traced module counts as one token"
Loss = Callable[[Any, Any], Tensor]


def trace(
    module: nn.Module, batch: Any, loss: Loss | None = None, *, strategy: Strategy | None = None, gpu: Gpu | None = None,
    name: str = "", samples: int = 0,
) -> ModelSpec:  # fmt: skip
    """``module`` as a model for a ``Job``: its units (``runtime.units``), their operators, and what autograd keeps of them.

    ``batch`` is an example of one micro-batch, of which only shapes and dtypes are read: a tensor, a tuple of positional or a
    dictionary of named arguments. The module returns the loss (a scalar, or something with a ``loss``); or ``batch`` is
    ``(inputs, targets)`` and ``loss(output, targets)`` is. ``strategy`` says what the trace is for (``dtype``, ``grad_dtype``,
    recomputation, ``attention``, ``kernels_off``; floating-point inputs come in its dtype); one trace serves every ZeRO stage, offload, optimizer and
    number of ranks. ``gpu``: a CPU's operators are traced for a CPU. ``samples``: of the batch, where its first tensor's first
    dimension is another. Raises ``InputError`` for a module that cannot run without data, or not unit by unit.
    """
    strategy = strategy or Strategy()
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise InputError("a module is traced in a process group of several ranks; allowed: before it is made")
    if parts_of(strategy.recompute):
        raise InputError(
            f"recompute is {strategy.recompute!r} for a traced module, whose parts have no names; allowed: none, selective, full"
        )
    what = name or type(module).__name__
    device = torch.device("cpu" if gpu is not None and gpu.arch == "cpu" else "meta")
    with placed(strategy, gpu):
        run = TracedRun(module, batch, loss, _alone(strategy), device)
        try:
            traced = _records(run, strategy, batch, samples)
        except InputError:
            raise
        except Exception as error:  # whatever a module does
            raise InputError(f"module {what} cannot be traced without data: {first_line(error)}") from error
    return traced_spec(what, traced)


@contextmanager
def placed(strategy: Strategy, gpu: Gpu | None) -> Iterator[None]:
    """Inside, tensors without data on ``meta`` (or, for a CPU, made on it) meet the operators that they meet on ``gpu``."""
    with ExitStack() as stack:
        if gpu is not None and gpu.arch == "cpu":
            stack.enter_context(FakeTensorMode())
        else:
            stack.enter_context(kernels_for(gpu, strategy))
            stack.enter_context(as_gpu(strategy.attention))
        yield


def _alone(strategy: Strategy) -> Strategy:
    """What decides the passes of a unit: all else is the program's."""
    return Strategy(
        dtype=strategy.dtype, grad_dtype=strategy.grad_dtype, recompute=strategy.recompute,
        recompute_every=strategy.recompute_every, kernels_off=strategy.kernels_off, grad_clip=0.0, optimizer="sgd",
    )  # fmt: skip


class TracedRun:
    """A module without data in the runtime's hands, and its micro-batches."""

    def __init__(
        self, module: nn.Module, batch: Any, loss: Loss | None, strategy: Strategy, device: torch.device,
        n_micro_batches: int = 1,
    ) -> None:  # fmt: skip
        self.engine = initialize(model=without_data(module, device), strategy=strategy, n_micro_batches=n_micro_batches)
        self._loss, self._device, self._dtype = loss, device, TORCH_DTYPES[strategy.dtype]
        if loss is not None and not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise InputError("batch is not a pair with a loss; allowed: (inputs, targets)")
        self._batch = batch

    def step(self) -> None:
        """All micro-batches of a training step."""
        for _ in range(self.engine.n_micro_batches):
            self.micro_batch()
            self.engine.step()

    def micro_batch(self) -> None:
        with input_memory():
            batch = like_batch(self._batch, self._device, self._dtype)
        inputs, targets = (batch, None) if self._loss is None else batch
        if isinstance(inputs, dict):
            output = self.engine(**inputs)
        else:
            output = self.engine(*inputs) if isinstance(inputs, tuple | list) else self.engine(inputs)
        value = _loss_in(output) if self._loss is None else _scalar(self._loss(output, targets))
        del output
        self.engine.backward(value)


def _loss_in(output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple | list) and output else output
    return _scalar(getattr(output, "loss", None) if hasattr(output, "loss") else first)


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        said = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(
            f"loss is {said}; allowed: a scalar that depends on trained parameters, from the module itself, from what it returns "
            "as its loss, or from loss(output, targets) with a batch of (inputs, targets)"
        )
    return value


def _records(run: TracedRun, strategy: Strategy, batch: Any, samples: int) -> Traced:
    engine, ledger = run.engine, Ledger()
    run.step()  # what a module makes once and keeps is there afterwards
    recorder = Recorder(ledger.now, lambda: engine.recompute_clock.active, strategy.dtype)
    with metered_by(ledger):
        for storage in engine.storages:
            storage.meter_all()
        engine.meter_tables(ledger)
        ledger.enter("forward", "start of the step")
        ledger.start_step()
        with recorder:
            run.micro_batch()
        engine.step()
    first = next((x for x in tree_leaves(batch) if isinstance(x, Tensor) and x.dim()), None)
    if first is None and not samples:
        raise InputError("batch has no tensor; allowed: one whose first dimension is the samples'")
    is_tokens = first is not None and first.dim() > 1 and not first.is_floating_point()
    costs = _costs(engine, ledger, recorder)
    kinds = {cost: number for number, cost in enumerate(dict.fromkeys(costs))}
    return Traced(
        units=tuple(
            TracedUnit(
                unit.name, tuple(TracedParam(p.name, p.shape, p.trained) for p in unit.params), unit.borrows,
                unit.backward_reads, kinds[cost],
            )
            for unit, cost in zip(engine.layout.units, costs, strict=True)
        ),
        costs=tuple(kinds),
        buffer_bytes=sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in engine.model.buffers()}.values()),
        micro_batch_size=samples or first.shape[0],  # type: ignore[union-attr]
        seq_len=first.shape[1] if is_tokens else 1,  # type: ignore[union-attr]
        is_cpu=engine.device.type == "cpu",
        dtype=strategy.dtype, grad_dtype=strategy.grad_dtype, recompute=strategy.recompute,
        recompute_every=strategy.recompute_every, attention=strategy.attention, kernels_off=strategy.kernels_off,
        notes=(*(() if is_tokens else (_SAMPLES,)), *recorder.unknown),
    )  # fmt: skip


def _costs(engine: Engine, ledger: Ledger, recorder: Recorder) -> list[TracedCost]:
    """Of every unit. What comes before the first unit's pass (the batch) belongs to it."""
    units = engine.layout.units
    changes: dict[tuple[str, str], list[tuple[str, int]]] = {}
    before: list[tuple[str, int]] = []
    for phase, where, changed in ledger.passes():
        if where == "start of the step":
            before += changed
        else:
            changes.setdefault((phase, where), []).extend(changed)
    costs = []
    for number, unit in enumerate(units):
        phase = "loss" if number == len(units) - 1 else "forward"
        forward, backward = (phase, f"{phase} of {unit.name}"), ("backward", f"backward of {unit.name}")
        made = (before if number == 0 else []) + changes.get(forward, [])
        ops = [recorder.passes.get((where, replayed), []) for where, replayed in ((forward, False), (backward, False))]
        costs.append(
            TracedCost(
                _pass(ops[0], made),
                _pass(ops[1], changes.get(backward, [])),
                tuple(recorder.passes.get((backward, True), [])),
            )
        )
    return costs


def _pass(ops: Sequence[TracedOp], changes: Iterable[tuple[str, int]]) -> TracedPass:
    """Largest total and largest by category of ``changes``, in their order, from zero."""
    live: dict[str, int] = {}
    total = peak_total = 0
    peak: dict[str, int] = {}
    category_peak: dict[str, int] = {}
    for category, n_bytes in changes:
        live[category] = live.get(category, 0) + n_bytes
        total += n_bytes
        category_peak[category] = max(category_peak.get(category, 0), live[category])
        if total > peak_total:
            peak_total, peak = total, dict(live)

    def held(by_category: dict[str, int]) -> tuple[Held, ...]:
        return tuple(Held(*item) for item in sorted(by_category.items()) if item[1])

    return TracedPass(tuple(ops), held(peak), held(live), held(category_peak))
