"""Signs with a scale per block and error feedback: what 1-bit Adam (Tang et al. 2021) sends of its momentum.

The scale is the block's mean magnitude, which loses least (Karimireddy et al. 2019).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import invalid
from estimator.ops.kernels.one_bit import sign_bytes
from runtime.kernels import loader
from runtime.kernels.loader import Kernel, ceil_div, chip, kernel, launch, type_name

BLOCKS = (64, 128, 256, 512, 1024, 2048)
"""Elements that may share a scale."""
_PIECES_AT_ONCE = 4


class Signs(NamedTuple):
    """A packed tensor, or several of one shape one below the other."""

    bits: Tensor
    """uint8 ``[bytes]`` or ``[pieces, bytes]``: bit j of byte i is set where element 8 i + j is not negative."""
    scales: Tensor
    """fp32 ``[blocks]`` or ``[pieces, blocks]``; NaN for a block that held a NaN or an infinity."""
    numel: int
    """Elements of one piece."""
    block: int


def one_bit_pack(x: Tensor, error: Tensor, block: int, into: tuple[Tensor, Tensor] | None = None) -> Signs:
    """Signs and scales of ``x + error``; what they lose is left in ``error``.

    ``x`` any shape (fp32, bf16, fp16); ``error`` fp32, contiguous, of its size, changed in place (not in blocks that are not
    finite); ``block`` one of ``BLOCKS``; ``into``: bits and scales to write, contiguous, else they are made. Raises
    ``InputError`` for sizes that do not fit.
    """
    _check_block(block)
    if error.numel() != x.numel() or error.dtype != torch.float32 or not error.is_contiguous():
        raise invalid("error", (tuple(error.shape), error.dtype), f"{x.numel()} fp32, contiguous")
    if not loader.uses_kernel("one_bit", x):
        made = one_bit_pack_reference(x, error, block)
        return made if into is None else made._replace(bits=into[0].copy_(made.bits), scales=into[1].copy_(made.scales))
    return _pack(x, error, block, into)


def one_bit_pack_reference(x: Tensor, error: Tensor, block: int) -> Signs:
    """``one_bit_pack`` in plain torch: the same bits; scales and errors differ by the order of a sum."""
    n, flat = x.numel(), error.view(-1)
    blocks = F.pad(x.detach().reshape(-1).float() + flat, (0, -n % block)).view(-1, block)
    lengths = torch.full((len(blocks), 1), float(block), device=x.device)
    if n % block:
        lengths[-1] = n % block
    scale = blocks.abs().sum(1, keepdim=True) / lengths
    finite, positive = scale.isfinite(), blocks >= 0
    lost = torch.where(
        finite, blocks - torch.where(positive, scale, -scale), F.pad(flat, (0, -n % block)).view(-1, block)
    )
    flat.copy_(lost.view(-1)[:n])
    positive.view(-1)[n:] = False
    weights = 2 ** torch.arange(8, dtype=torch.int32, device=x.device)
    bits = (positive.view(-1, 8) * weights).sum(1)[: ceil_div(n, 8)].to(torch.uint8)
    return Signs(bits, torch.where(finite, scale, torch.nan).view(-1), n, block)


def one_bit_sum(
    received: Signs, dtype: torch.dtype = torch.float32, factor: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """``factor`` times the sum of all pieces of ``received``, ``[numel]`` of ``dtype``: summed in order, in fp32, rounded
    once; ``out`` (of that kind, contiguous) is filled where it is given. Raises ``InputError`` for sizes that do not fit
    together."""
    _check_block(received.block)
    bits, scales = received.bits, received.scales
    wanted = (sign_bytes(received.numel), ceil_div(received.numel, received.block))
    if (bits.shape[-1], scales.shape[-1]) != wanted or bits.shape[:-1] != scales.shape[:-1] or bits.ndim > 2:
        found = (tuple(bits.shape), tuple(scales.shape))
        raise invalid("shapes of bits and scales", found, f"[{wanted[0]}] and [{wanted[1]}], or [pieces, ...] of both")
    if not loader.uses_kernel("one_bit", scales):
        made = one_bit_sum_reference(received, dtype, factor)
        return made if out is None else out.copy_(made)
    return _sum(received, dtype, factor, out)


def one_bit_sum_reference(received: Signs, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
    """``one_bit_sum`` in plain torch."""
    n = received.numel
    bits, scales = (t if t.ndim == 2 else t[None] for t in received[:2])
    total = torch.zeros(n, dtype=torch.float32, device=bits.device)
    for piece, scale in zip(bits, scales, strict=True):
        positive = (piece[:, None] >> torch.arange(8, device=bits.device) & 1).flatten()[:n].bool()
        each = scale.repeat_interleave(received.block)[:n]
        total += torch.where(positive, each, -each)
    return (total * factor).to(dtype)


def _check_block(block: int) -> None:
    if block not in BLOCKS:
        raise invalid("block", block, ", ".join(map(str, BLOCKS)))


# ---- launchers --------------------------------------------------------------------------------------------------------


@functools.cache
def _kernel(function: str, dtype: torch.dtype, block: int, aligned: bool, device: torch.device) -> Kernel:
    return kernel(
        "one_bit", function, X_TYPE=type_name(dtype), BLOCK=block, LANES=min(32, block // 16), ALIGNED=int(aligned),
        UNROLL=_PIECES_AT_ONCE, THREADS=chip(device).tile.threads,
    )  # fmt: skip


@loader.outside_compile
def _pack(x: Tensor, error: Tensor, block: int, into: tuple[Tensor, Tensor] | None = None) -> Signs:
    x = x.detach().contiguous()
    n = x.numel()
    bits, scales = into or (
        torch.empty(sign_bytes(n), dtype=torch.uint8, device=x.device),
        torch.empty(ceil_div(n, block), dtype=torch.float32, device=x.device),
    )
    aligned = loader.pack_width(x, error) * min(x.itemsize, error.itemsize) == 16
    compiled = _kernel("one_bit_pack", x.dtype, block, aligned, x.device)
    defines = dict(compiled.defines)
    threads, lanes = int(defines["THREADS"]), int(defines["LANES"])
    launch(compiled, ceil_div(len(scales), threads // lanes), threads, x, error, bits, scales, n)
    return Signs(bits, scales, n, block)


@loader.outside_compile
def _sum(received: Signs, dtype: torch.dtype, factor: float, out: Tensor | None = None) -> Tensor:
    n, pieces = received.numel, len(received.bits) if received.bits.ndim == 2 else 1
    bits, scales = (t.contiguous() for t in received[:2])
    out = torch.empty(n, dtype=dtype, device=bits.device) if out is None else out
    compiled = _kernel("one_bit_sum", dtype, received.block, True, bits.device)
    threads = chip(bits.device).tile.threads
    launch(
        compiled, ceil_div(n, 8 * threads), threads, bits, scales, out, n, pieces, bits.shape[-1], scales.shape[-1],
        float(factor),
    )  # fmt: skip
    return out
