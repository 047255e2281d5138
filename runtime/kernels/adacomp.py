"""AdaComp (Chen et al. 2018): sparse gradients with error feedback; which elements are sent adapts to each bin.

Select, add up the counts, pack: two passes over gradient and residual, since what stays behind depends on the mean over all
bins. Nothing waits for the device: messages have a fixed capacity, and what does not fit stays in the residual.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import invalid, require_int
from runtime.kernels import loader
from runtime.kernels.loader import Kernel, ceil_div, chip, kernel, launch, type_name

MAX_BIN = 1 << 15
"""Largest bin: an entry has 15 bits for the place in it."""
_NEGATIVE = -(1 << 15)


class AdaCompMessage(NamedTuple):
    """What one rank sends."""

    entries: Tensor
    """int16 ``[capacity]``: place in the bin (15 bits), sign on top; bin by bin. Unspecified past the sum of the counts, and where ``scale`` is NaN."""
    counts: Tensor
    """int32 ``[bins]``: elements chosen in each bin (those past the capacity are not among the entries)."""
    scale: Tensor
    """fp32 ``[1]``: magnitude of every entry; NaN where the gradient held a NaN or an infinity."""
    numel: int
    bin: int

    @property
    def wire_bytes(self) -> int:
        return sum(t.numel() * t.itemsize for t in self[:3])


def adacomp_pack(
    grad: Tensor, residual: Tensor, bin: int, capacity: int | None = None, boost: float = 2.0,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> AdaCompMessage:  # fmt: skip
    """Chooses what to send of ``residual + grad`` and leaves the rest in ``residual``.

    ``grad`` any shape (fp32, bf16, fp16); ``residual`` fp32, contiguous, of its size, changed in place. An element is sent
    when ``|residual + boost * grad|`` reaches the largest ``|residual + grad|`` of its ``bin`` neighbours (the paper: 50 for
    convolutions, 500 for other layers; boost 2). At most ``capacity`` elements (default: all could be). Where the gradient
    is not finite the residual stays as it was. ``into``: entries, counts and scale to write, contiguous; else they are made.
    Raises ``InputError`` for sizes that do not fit.
    """
    if not 1 <= require_int("bin", bin) <= MAX_BIN:
        raise invalid("bin", bin, f"1 to {MAX_BIN}")
    if residual.numel() != grad.numel() or residual.dtype != torch.float32 or not residual.is_contiguous():
        raise invalid("residual", (tuple(residual.shape), residual.dtype), f"{grad.numel()} fp32, contiguous")
    room = grad.numel() if capacity is None else require_int("capacity", capacity, minimum=0)
    if loader.uses_kernel("adacomp", grad):
        return _pack(grad, residual, bin, room, boost, into)
    made = adacomp_pack_reference(grad, residual, bin, room, boost)
    if into is None:
        return made
    entries, counts, scale = (to.copy_(x) for x, to in zip(made[:3], into, strict=True))
    return AdaCompMessage(entries, counts, scale, made.numel, made.bin)


def adacomp_pack_reference(
    grad: Tensor, residual: Tensor, bin: int, capacity: int | None = None, boost: float = 2.0
) -> AdaCompMessage:
    """``adacomp_pack`` in plain torch: the same bits."""
    n = grad.numel()
    flat, kept = grad.detach().reshape(-1).float(), residual.view(-1)
    total = _padded(kept + flat, bin)
    tops = torch.where(total.isfinite().all(1), total.abs().amax(1), torch.nan)
    chosen = (_padded(kept + boost * flat, bin).abs() >= tops[:, None]) & (tops[:, None] > 0)
    chosen.view(-1)[n:] = False
    counts, scale = chosen.sum(1, dtype=torch.int32), _scale(tops)
    where = chosen.view(-1).nonzero()[:, 0][:capacity]
    values = total.view(-1)[where]
    room = n if capacity is None else capacity
    entries = torch.zeros(room, dtype=torch.int16, device=grad.device)
    entries[: len(where)] = torch.where(values < 0, where % bin + _NEGATIVE, where % bin).to(torch.int16)
    after = total.view(-1)[:n].clone()
    after[where] += torch.where(values < 0, scale, -scale)
    kept.copy_(torch.where(scale.isfinite(), after, kept))
    return AdaCompMessage(entries, counts, scale, n, bin)


def adacomp_add(message: AdaCompMessage, out: Tensor) -> Tensor:
    """``out += `` what ``message`` holds; ``out`` fp32 of its size, contiguous; returned. A scale that is NaN puts NaNs there.

    Several messages are added one after the other, in the order of the calls.
    """
    if out.numel() != message.numel or out.dtype != torch.float32 or not out.is_contiguous():
        raise invalid("out", (tuple(out.shape), out.dtype), f"{message.numel} fp32, contiguous")
    work = _add if loader.uses_kernel("adacomp", out) else adacomp_add_reference
    return work(message, out)


def adacomp_add_reference(message: AdaCompMessage, out: Tensor) -> Tensor:
    """``adacomp_add`` in plain torch."""
    flat, counts = out.view(-1), message.counts.long()
    if not bool(message.scale.isfinite()):
        flat[:: message.bin] = torch.nan
        return out
    bins = torch.arange(len(counts), device=out.device).repeat_interleave(counts)[: len(message.entries)]
    entries = message.entries[: len(bins)].long()
    values = torch.where(entries < 0, -message.scale, message.scale)
    flat[bins * message.bin + (entries & 0x7FFF)] += values
    return out


def _padded(flat: Tensor, bin: int) -> Tensor:
    return F.pad(flat, (0, -flat.numel() % bin)).view(-1, bin)


def _scale(tops: Tensor) -> Tensor:
    """What every entry stands for: the mean of the bins' largest (algorithm 2), fp32 ``[1]``."""
    return tops.mean(0, keepdim=True)


# ---- launchers --------------------------------------------------------------------------------------------------------


@functools.cache
def _kernel(function: str, dtype: torch.dtype, pack: int, device: torch.device) -> Kernel:
    return kernel("adacomp", function, X_TYPE=type_name(dtype), PACK=pack, THREADS=chip(device).tile.threads)


def _launch(function: str, dtype: torch.dtype, pack: int, n_bins: int, *arguments: Tensor | int | float) -> None:
    first = arguments[0]
    assert isinstance(first, Tensor)
    threads = chip(first.device).tile.threads
    launch(_kernel(function, dtype, pack, first.device), ceil_div(n_bins, threads // 32), threads, *arguments)


@loader.outside_compile
def _pack(
    grad: Tensor, residual: Tensor, bin: int, capacity: int, boost: float,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> AdaCompMessage:  # fmt: skip
    grad = grad.detach().contiguous()
    n, n_bins, device = grad.numel(), ceil_div(grad.numel(), bin), grad.device
    tops = torch.empty(n_bins, dtype=torch.float32, device=device)
    entries, counts, room = into or (
        torch.empty(capacity, dtype=torch.int16, device=device),
        torch.empty(n_bins, dtype=torch.int32, device=device),
        None,
    )
    pack = loader.pack_width(grad, residual, row=bin)
    _launch("adacomp_select", grad.dtype, pack, n_bins, grad, residual, tops, counts, n, bin, float(boost))
    ends, scale = counts.cumsum(0), _scale(tops)
    scale = scale if room is None else room.copy_(scale)
    _launch(
        "adacomp_pack", grad.dtype, pack, n_bins, grad, residual, tops, counts, ends, scale, entries, n, bin, capacity,
        float(boost),
    )  # fmt: skip
    return AdaCompMessage(entries, counts, scale, n, bin)


@loader.outside_compile
def _add(message: AdaCompMessage, out: Tensor) -> Tensor:
    entries, counts, scale, n, bin = message
    ends = counts.cumsum(0)
    _launch("adacomp_add", torch.float32, 1, len(counts), entries, counts, ends, scale, out, n, bin, len(entries))
    return out
