"""Obeying a pipeline rank's program: passes over chunks in the schedule's order, and what goes from rank to rank.

A chunk's input ends the graph that autograd sees of it (``_Entry``), and a scalar begins it (``_Exit``): its backward pass hands
out the gradient that another rank has sent. So neither a chunk's input, nor its output, nor their gradients are held by
anything but what still needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job.mesh import Mesh, Span
from estimator.job.strategy import Strategy
from estimator.schedule.events import BOUNDARY_CATEGORY, Boundary, Recv, Section, Send, Sent, StepProgram
from estimator.schedule.pipeline import Action
from runtime.comm import Communicator
from runtime.context import current_ledger, managed_memory
from runtime.models.stage import DecoderStage
from runtime.storage import TORCH_DTYPES

if TYPE_CHECKING:
    from runtime.engine import Engine


class Peers:
    """What is on its way to other pipeline ranks and from them."""

    def __init__(self, comm: Communicator, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._comm, self._shape, self._dtype, self._device = comm, shape, dtype, device
        self.outgoing: Tensor | None = None
        """What the next ``Send`` sends; the program waits there until it is made."""
        self._sending: dict[Boundary, Tensor] = {}
        self._received: dict[Boundary, list[Tensor]] = {"activations": [], "gradients": []}

    def send(self, event: Send) -> Any:
        assert self.outgoing is not None
        tensor, self.outgoing = self.outgoing.contiguous(), None
        assert tensor.numel() * tensor.element_size() == event.n_bytes
        self._sending[event.what] = tensor
        with managed_memory():
            return self._comm.send(tensor, event.offset, event.what)

    def sent(self, event: Sent) -> None:
        del self._sending[event.what]

    def recv(self, event: Recv, stream: AbstractContextManager[Any]) -> Any:
        ledger = current_ledger()
        if ledger is None:
            tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        else:
            with ledger.category(BOUNDARY_CATEGORY[event.what]):
                tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        self._received[event.what].append(tensor)
        with stream, managed_memory():
            return self._comm.recv(tensor, event.offset, event.what)

    def take(self, what: Boundary) -> Tensor:
        """What has come first; from now on it is the taker's alone."""
        return self._received[what].pop(0)


class _Entry(torch.autograd.Function):
    """A chunk's input; its gradient goes into ``box``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, box: list[Tensor]) -> Tensor:
        """``anchor`` requires a gradient, so that the result does."""
        ctx.box = box
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:  # type: ignore[override]
        ctx.box.append(grad)
        return None, None, None


class _Exit(torch.autograd.Function):
    """A scalar for a chunk's output, whose gradient will be in ``box``."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        return out.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.box.pop(), None


class PipelineRun:
    """Runs all passes of a step of one rank."""

    def __init__(self, engine: Engine, model: DecoderStage) -> None:
        self._engine, self._model, self._stage = engine, model, model.stage
        self._executor = engine.executor
        self.order = self._stage.order(engine.strategy, engine.n_micro_batches)
        self._late = engine.leave_weights() if engine.strategy.pp_schedule == "zero_bubble" else None
        dtype = TORCH_DTYPES[engine.strategy.dtype]
        self._peers = self._executor.peers = Peers(engine.comm, model.boundary_shape, dtype, engine.device)
        self._anchor = torch.zeros((), dtype=dtype, device=engine.device, requires_grad=True)
        self._events = flat(engine.program)
        self._open: dict[tuple[int, int], tuple[Tensor, list[Tensor], list[Tensor]]] = {}
        """By chunk and micro-batch that has gone forward: where its backward pass begins, the box of its output's gradient and
        that of its input's."""

    def run(self, batches: Sequence[Any]) -> list[Tensor]:
        """All passes of a step over ``batches``, one of ids and labels for each micro-batch. Losses, where the last stage is."""
        self._executor.begin(self._events)
        self._model.loss_gradient.value = self._engine.loss_gradient()
        losses: list[Tensor] = []
        parts = self._executor.parts
        for action in self.order:
            part = "forward" if action.direction == "forward" else "backward"
            with parts.part(part):
                if action.direction == "forward":
                    with self._late.linears() if self._late is not None else nullcontext():
                        losses += self._forward(action, *batches[action.micro_batch])
                elif action.direction == "weight_grad":
                    self._make_late(action)
                else:
                    self._backward(action)
        self._executor.finish()
        return losses

    def check(self, batches: Sequence[Any]) -> None:
        """Raises ``InputError`` unless there is one pair for each micro-batch, of the size that goes from stage to stage."""
        n, shape = self._engine.n_micro_batches, self._model.batch_shape
        if len(batches) != n:
            raise InputError(f"train_step was given {len(batches)} micro-batches; allowed: {n}")
        if self._engine.check_gradients:
            raise InputError(
                "check_gradients is on in a pipeline, whose ranks have different parameters; allowed: False"
            )
        reads = (self._stage.rank == 0, self._stage.is_last)
        for ids, labels in batches:
            for tensor in (x for x, is_read in zip((ids, labels), reads, strict=True) if is_read):
                if tensor is not None and tuple(tensor.shape) == shape:
                    continue
                got = None if tensor is None else tuple(tensor.shape)
                raise InputError(f"a micro-batch is {got}; allowed: {shape}, which the stage was made for")

    def share(self, loss: Tensor | None) -> Tensor | None:
        """The ``loss`` of the last stage."""
        comm = self._engine.comm
        if comm.is_virtual:
            return loss
        total = torch.zeros(1, device=self._engine.device) if loss is None else loss.float().view(1).clone()
        comm.sum_now(total, comm.mesh.span("pp"))
        return total

    def join(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """``named`` parameters of all stages, a tied table once. A collective call."""
        comm, device = self._engine.comm, self._engine.device
        tied = self._model.shared_params[1:]
        own = {name: param.cpu() for name, param in named.items() if name not in tied}
        return {
            name: param.to(device) for part in comm.collect(own, comm.mesh.span("pp")) for name, param in part.items()
        }

    def _forward(self, action: Action, ids: Tensor, labels: Tensor) -> list[Tensor]:
        executor, peers = self._executor, self._peers
        executor.advance()
        grad_of_input: list[Tensor] = []
        grad_of_output: list[Tensor] = []
        if self._stage.receives(action) is None:
            x = ids
        else:
            x = _Entry.apply(peers.take("activations"), self._anchor, grad_of_input)
        self._engine.begin_pass()
        key = (action.chunk, action.micro_batch)
        if self._stage.sends(action) is None:
            loss = self._model(action.chunk, x, labels)
            self._open[key] = (loss, grad_of_output, grad_of_input)
            executor.advance()
            return [loss.detach()]
        out = self._model(action.chunk, x)
        del x
        self._open[key] = (_Exit.apply(out, grad_of_output), grad_of_output, grad_of_input)
        peers.outgoing = out.detach()
        del out
        executor.advance()
        return []

    def _backward(self, action: Action) -> None:
        executor, peers = self._executor, self._peers
        executor.advance()
        start, grad_of_output, grad_of_input = self._open.pop((action.chunk, action.micro_batch))
        if self._stage.receives(action) is None:
            start = self._engine.weighed(start)
        else:
            grad_of_output.append(peers.take("gradients"))
        key = (action.chunk, action.micro_batch)
        with self._late.collect(key) if self._late is not None else nullcontext():
            start.backward()
        del start
        if self._stage.sends(action) is not None:
            peers.outgoing = grad_of_input.pop()
        executor.advance()

    def _make_late(self, action: Action) -> None:
        assert self._late is not None
        self._executor.advance()
        self._late.make((action.chunk, action.micro_batch), self._stage.chunks[action.chunk])
        self._executor.advance()


def flat(program: StepProgram) -> Section:
    """All passes of a step as one section."""
    sections = [s for s in program.step if s.name == "micro_batch"]
    return Section("micro_batch", tuple(event for s in sections for _ in range(s.repeat) for event in s.events))


def mesh_of(strategy: Strategy) -> Mesh | None:
    """The ranks of torch.distributed's default group where ``strategy`` has a pipeline; ``None``: not its concern."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if strategy.pp == 1:
        return None
    size = strategy.tp * strategy.pp
    if world % size:
        raise InputError(f"tp * pp is {size}; allowed: a divisor of the {world} ranks of the process group")
    return Mesh(tp=strategy.tp, dp=world // size, pp=strategy.pp)


def ends_of(model: nn.Module, mesh: Mesh) -> Span | None:
    """First and last stage, where they hold the same parameter."""
    shares = isinstance(model, DecoderStage) and model.shared_params
    return Span(2, (mesh.pp - 1) * mesh.span("pp").stride) if shares else None


def check_model(model: nn.Module, strategy: Strategy, mesh: Mesh) -> None:
    """Raises ``InputError`` unless ``model`` is what this rank of a pipeline holds."""
    is_stage = isinstance(model, DecoderStage)
    if is_stage != (strategy.pp > 1):
        made = "a stage of a pipeline" if is_stage else "no stage of a pipeline"
        raise InputError(
            f"pp is {strategy.pp}, but the model is {made}; allowed: runtime.models.DecoderStage with pp of at least 2, any other "
            "module with pp 1"
        )
    if isinstance(model, DecoderStage):
        place = mesh.place("pp", dist.get_rank())
        if (model.stage.rank, model.stage.pp) != (place, mesh.pp):
            raise InputError(
                f"the model is stage {model.stage.rank} of {model.stage.pp}; allowed on this rank: {place} of {mesh.pp}"
            )
