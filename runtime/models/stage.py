"""The part of the reference decoder that one pipeline rank holds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from estimator.job.job import Job
from estimator.job.model import ModelSpec
from estimator.job.strategy import Strategy
from estimator.schedule.stages import PipelinePlace
from estimator.sharding.stages import stage_units, untied
from estimator.sharding.units import model_units
from estimator.units import DTYPE_BYTES
from runtime.hollow import hollow
from runtime.models.decoder import Decoder, initial_values
from runtime.parallel.layers import Fill, WholeLayers

_TABLE, _PROJECTION = "embed.tokens.weight", "head.out.weight"


class DecoderStage(nn.Module):
    """The chunks of pipeline rank ``rank`` of ``spec``'s decoder, made on ``meta`` unless told otherwise: shapes without memory.

    ``place(device)`` gives it a device; its values are drawn there, by ``reset_parameters`` or, group by group, by
    ``runtime.initialize(fill=stage_values(...))``. First and last stage each hold a copy of a tied embedding.
    """

    cos: Tensor | None
    sin: Tensor | None

    def __init__(
        self, spec: ModelSpec, strategy: Strategy, rank: int, *, micro_batch_size: int, seq_len: int | None = None,
        device: str = "meta", layers: WholeLayers | None = None,
    ) -> None:  # fmt: skip
        """Of every micro-batch, ``[micro_batch_size, seq_len, D]`` passes from stage to stage in the strategy's dtype, or what
        this rank has of it where others share its ``layers``."""
        super().__init__()
        held = stage_units(spec, strategy, rank)
        with torch.device(device):
            whole = Decoder(untied(spec), seq_len, layers)
        self.spec, self.seq_len, self.layers = spec, whole.seq_len, whole.layers
        self.loss_gradient = whole.loss_gradient
        self.batch_shape = (micro_batch_size, whole.seq_len)
        self.boundary_shape = (*self.layers.begin(self.batch_shape), spec.d_model)
        n_bytes = math.prod(self.boundary_shape) * DTYPE_BYTES[strategy.dtype]
        self.stage = PipelinePlace(rank, strategy.pp, held.chunks, n_bytes)
        self.shared_params = (_TABLE, _PROJECTION) if spec.tied_embeddings else ()
        """Names of what another stage holds too."""
        self._numbers, self._head = held.numbers, spec.n_layers + 1
        if held.numbers[0] == 0:
            self.embed = whole.embed
        blocks = [number - 1 for number in held.numbers if 0 < number < self._head]
        self.blocks = nn.ModuleDict({str(i): whole.blocks[i] for i in blocks})
        if held.numbers[-1] == self._head:
            self.head = whole.head
        self.register_buffer("cos", whole.cos, persistent=False)
        self.register_buffer("sin", whole.sin, persistent=False)

    def recomputing(self, every: int) -> frozenset[int]:
        """Indices among its units of the blocks that are the whole decoder's 0, ``every``, 2 ``every``, ..."""
        blocks = range(1, self._head, every)
        return frozenset(i for i, number in enumerate(self._numbers) if number in blocks)

    def place(self, device: torch.device | str) -> DecoderStage:
        """Move it to ``device``: parameters without memory yet, rotary tables filled."""
        hollow(self, torch.device(device))
        Decoder.fill_tables(self)  # type: ignore[arg-type]  # which reads no more than a stage has
        return self

    def reset_parameters(self, seed: int = 0, std: float = 0.02) -> None:
        """The values that the whole decoder has for this ``seed``."""
        fill = stage_values(self.spec, next(self.parameters()).device, seed, std)
        with torch.no_grad():
            for name, param in self.named_parameters():
                param.untyped_storage().resize_(param.numel() * param.element_size())
                self.layers.fill(name, param, getattr(param, "part", None), fill)

    def forward(self, chunk: int, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """One micro-batch through ``chunk``: ``x`` is ids ``[B, S]`` where the embedding is in it, else ``[B, S, D]``; returns
        the same for the next chunk, or the mean loss of ``labels`` ``[B, S]`` where the head is in it."""
        for unit in self.stage.chunks[chunk]:
            number = self._numbers[unit]
            if number == 0:
                x = self.embed(x)
            elif number == self._head:
                assert labels is not None
                x = self.head(x, labels)
            else:
                x = self.blocks[str(number - 1)](x, self.cos, self.sin)
        return x


def stage_of(job: Job, rank: int, device: str, layers: WholeLayers, *, is_real: bool) -> DecoderStage:
    """Pipeline rank ``rank``'s part of ``job``'s model on ``device``, whose values are still to be drawn; where tensors are not
    ``is_real``, none will be."""
    w = job.workload
    stage = DecoderStage(
        job.model, job.strategy, rank, micro_batch_size=w.micro_batch_size, seq_len=w.seq_len,
        device="meta" if is_real else device, layers=layers,
    )  # fmt: skip
    return stage.place(device) if is_real else stage


def stage_values(spec: ModelSpec, device: torch.device, seed: int = 0, std: float = 0.02) -> Fill:
    """What ``initial_values`` writes of the whole decoder, for one who asks for some of its parameters, in their order: the
    others are drawn and thrown away."""
    values = initial_values(device, seed, std, spec.lora)
    everything = ((f"{unit.name}.{param.name}", param.shape) for unit in model_units(spec) for param in unit.params)
    table: Tensor | None = None

    def pass_over(until: str) -> None:
        nonlocal table
        for name, shape in everything:
            if name == until:
                return
            drawn = torch.empty(shape, device=device)
            values(name, drawn)
            if name == _TABLE and spec.tied_embeddings:
                table = drawn

    def fill(name: str, param: Tensor) -> None:
        if name == _PROJECTION and spec.tied_embeddings:
            assert table is not None, "the last stage has passed over the embedding"
            param.copy_(table)
            return
        pass_over(name)
        values(name, param)

    return fill
