"""Recurrent networks as cuDNN runs them: one operator, which keeps its inputs, its result and a reserve of its own.

``nn.LSTM`` and its kin in full sequences (not packed ones). What cuDNN puts into the reserve is not documented: it is taken as
gates, cell and hidden states of every step, which is what the backward pass cannot do without.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.tracing.recorder import matmul, note, note_unknown

_UNKNOWN = "what cuDNN keeps for a recurrent layer's backward pass is not documented; gates, cell and hidden states are counted"


class _Kind(NamedTuple):
    """A recurrent cell."""

    gates: int
    """Rows of its weights, in hidden sizes."""
    kept: int
    """Numbers of one step that backward reads, in hidden sizes."""
    has_cell: bool = False


class _Call(NamedTuple):
    """What is computed, besides the tensors."""

    kind: _Kind
    n_layers: int
    n_directions: int
    hidden: int
    has_biases: bool
    dropout: float

    @property
    def copies_weights(self) -> bool:
        """cuDNN wants all weights before all biases. In the module's order they are where there is one cell, or no bias."""
        return self.has_biases and self.n_layers * self.n_directions > 1


class _Cudnn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, h: Tensor, c: Tensor | None, *weights: Tensor) -> tuple[Tensor, ...]:
        n_steps, batch, _ = x.shape
        width = call.n_directions * h.shape[-1]
        y, last_h = x.new_empty(n_steps, batch, width), torch.empty_like(h)
        last_c = torch.empty_like(c) if c is not None else x.new_empty(0)
        layers = call.n_layers * call.n_directions
        reserve_numel = call.kind.kept * call.hidden * layers * n_steps * batch
        if call.dropout:
            reserve_numel += (call.n_layers - 1) * n_steps * batch * width
        reserve = torch.empty(reserve_numel * x.element_size(), dtype=torch.uint8, device=x.device)
        buffer = x.new_empty(sum(w.numel() for w in weights) if call.copies_weights else 0)
        ctx.call = call
        ctx.save_for_backward(x, h, c, y, reserve, buffer, *weights)
        _note(call, x, weights, backward=False)
        note_unknown(_UNKNOWN)
        return y, last_h, last_c

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, h, c, _y, _reserve, _buffer, *weights = ctx.saved_tensors
        dx, dh = torch.empty_like(x), torch.empty_like(h)
        dc = torch.empty_like(c) if c is not None else None
        flat = torch.zeros(sum(w.numel() for w in weights), dtype=x.dtype, device=x.device)
        parts = flat.split([w.numel() for w in weights])
        _note(ctx.call, x, weights, backward=True)
        return (None, dx, dh, dc, *(part.view(w.shape) for part, w in zip(parts, weights, strict=True)))


def _note(call: _Call, x: Tensor, weights: Any, *, backward: bool) -> None:
    """Products of each cell with its inputs, all steps at once, and with its states, one step after another."""
    n_steps, batch, _ = x.shape
    of_cell = len(weights) // (call.n_layers * call.n_directions)
    for index, weight in enumerate(weights):
        place = index % of_cell
        if place > 1:  # biases, a projection
            continue
        rows, width = weight.shape
        shape = (1, n_steps * batch, rows, width) if place == 0 else (1, batch, rows, width * n_steps)
        n_bytes = (weight.numel() + n_steps * batch * (rows + width)) * x.element_size()
        for part in ("grad_input", "grad_weight") if backward else ("forward",):
            note(matmul(f"rnn_{part}", shape, n_bytes, x.dtype, launches=1 if place == 0 else n_steps))


def _run(
    kind: _Kind, x: Tensor, states: tuple[Tensor, ...], weights: list[Tensor], has_biases: bool, n_layers: int,
    dropout: float, train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = x.transpose(0, 1) if batch_first else x
    hidden = weights[0].shape[0] // kind.gates
    call = _Call(kind, n_layers, 2 if bidirectional else 1, hidden, has_biases, dropout if train else 0.0)
    y, h, c = _Cudnn.apply(call, rows, states[0], states[1] if kind.has_cell else None, *weights)
    y = y.transpose(0, 1) if batch_first else y
    return (y, h, c) if kind.has_cell else (y, h)


def lstm(x: Tensor, hx: list[Tensor], params: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """``aten::lstm.input``."""
    return _run(_Kind(4, 6, True), x, tuple(hx), params, *rest)


def gru(x: Tensor, hx: Tensor, params: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """``aten::gru.input``: also keeps the product that the reset gate multiplies."""
    return _run(_Kind(3, 5), x, (hx,), params, *rest)


def rnn_tanh(x: Tensor, hx: Tensor, params: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """``aten::rnn_tanh.input``."""
    return _run(_Kind(1, 1), x, (hx,), params, *rest)


def rnn_relu(x: Tensor, hx: Tensor, params: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """``aten::rnn_relu.input``."""
    return _run(_Kind(1, 1), x, (hx,), params, *rest)
