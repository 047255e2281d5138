"""Blockwise quantisation to int8, int4 and 8-bit floats, and the sum of several quantised tensors.

For gathered weights and reduced gradients (ZeRO++, Wang et al. 2023) and for 8-bit states (Dettmers et al. 2022, but linear
codes). A block's scale is its largest magnitude over the largest code.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from estimator.errors import invalid, require_choice
from estimator.ops.kernels.quantize import FORMAT_BITS, code_bytes
from runtime.kernels import loader
from runtime.kernels.loader import Kernel, ceil_div, chip, kernel, launch, type_name
from runtime.kernels.philox import random_bits

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048)
"""Elements that may share a scale."""
_SMALLEST = 2.0**-100
_PIECES_AT_ONCE = 4


class _Format(NamedTuple):
    code: int
    """``FORMAT`` in ``quantize.cuh``."""
    largest: float
    """Number of the largest code."""
    float8: tuple[int, int, int, torch.dtype] | None = None
    """Bits of the significand, bias of the exponent, largest code and torch's dtype of a floating-point format."""


FORMATS = {
    "int8": _Format(0, 127.0),
    "int4": _Format(1, 7.0),
    "e4m3": _Format(2, 448.0, (3, 7, 0x7E, torch.float8_e4m3fn)),
    "e5m2": _Format(3, 57344.0, (2, 15, 0x7B, torch.float8_e5m2)),
}


class Quantized(NamedTuple):
    """A quantised tensor, or several of one shape one below the other."""

    codes: Tensor
    """uint8 ``[bytes]`` or ``[pieces, bytes]``; int4: two elements to a byte, the even one in the low half."""
    scales: Tensor
    """fp32 ``[blocks]`` or ``[pieces, blocks]``; NaN for a block that held a NaN or an infinity."""
    numel: int
    """Elements of one piece."""
    format: str
    block: int


def quantize(
    x: Tensor, format: str, block: int, seed: Tensor | None = None, into: tuple[Tensor, Tensor] | None = None
) -> Quantized:
    """``x`` (any shape; fp32, bf16, fp16) in one of ``FORMATS``, ``block`` (one of ``BLOCKS``) elements to a scale.

    Rounds to nearest, ties to even; with ``seed`` (int64 ``[1]`` on ``x``'s device) stochastically: the expected value
    of what is stored is the element, and the same seed gives the same codes on every device. A block whose largest
    magnitude is below 2^-100 becomes zeros. ``into``: codes and scales to write, contiguous; else they are made. Raises
    ``InputError`` for an unknown format or block.
    """
    _check(format, block)
    if not loader.uses_kernel("quantize", x):
        return _moved(quantize_reference(x, format, block, seed), into)
    return _quantize(x, format, block, seed, into)


def _moved(made: Quantized, into: tuple[Tensor, Tensor] | None) -> Quantized:
    return made if into is None else made._replace(codes=into[0].copy_(made.codes), scales=into[1].copy_(made.scales))


def quantize_reference(x: Tensor, format: str, block: int, seed: Tensor | None = None) -> Quantized:
    """``quantize`` in plain torch: the same bits."""
    n, chosen = x.numel(), FORMATS[format]
    blocks = _padded(x.detach().reshape(-1).float(), block)
    largest = blocks.abs().amax(1, keepdim=True)
    top = torch.full_like(largest, chosen.largest)  # a tensor: torch multiplies by the inverse of a number instead
    scale = torch.where(largest < _SMALLEST, 0, largest / top)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    inverse = torch.where((largest >= _SMALLEST) & largest.isfinite(), top / largest, 0)
    v = torch.where(inverse == 0, 0, blocks * inverse)
    random = None if seed is None else _padded(random_bits(n, seed), block)
    if chosen.float8 is not None:
        codes = _float8_codes(v, chosen.float8, random)
    else:
        steps = v.round() if random is None else (v + random.float() / 65536).floor()
        codes = steps.clamp(-chosen.largest, chosen.largest).to(torch.int32) & (2 ** FORMAT_BITS[format] - 1)
    codes = codes.reshape(-1)
    if FORMAT_BITS[format] == 4:
        codes = codes[0::2] | codes[1::2] << 4
    return Quantized(codes[: code_bytes(n, format)].to(torch.uint8), scale.reshape(-1), n, format, block)


def dequantize_sum(
    received: Quantized, dtype: torch.dtype = torch.float32, factor: float = 1.0, out: Tensor | None = None
) -> Tensor:
    """``factor`` times the sum of all pieces of ``received``, ``[numel]`` of ``dtype``: summed in order, in fp32, rounded
    once; ``out`` (of that kind, contiguous) is filled where it is given. With one piece this is plain dequantisation.
    Raises ``InputError`` for sizes that do not fit together."""
    _check(received.format, received.block)
    codes, scales = received.codes, received.scales
    wanted = (code_bytes(received.numel, received.format), ceil_div(received.numel, received.block))
    if (codes.shape[-1], scales.shape[-1]) != wanted or codes.shape[:-1] != scales.shape[:-1] or codes.ndim > 2:
        found = (tuple(codes.shape), tuple(scales.shape))
        raise invalid("shapes of codes and scales", found, f"[{wanted[0]}] and [{wanted[1]}], or [pieces, ...] of both")
    if not loader.uses_kernel("quantize", scales):
        made = dequantize_sum_reference(received, dtype, factor)
        return made if out is None else out.copy_(made)
    return _dequantize(received, dtype, factor, out)


def dequantize_sum_reference(received: Quantized, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
    """``dequantize_sum`` in plain torch."""
    n, chosen = received.numel, FORMATS[received.format]
    codes, scales = (t if t.ndim == 2 else t[None] for t in received[:2])
    total = torch.zeros(n, dtype=torch.float32, device=codes.device)
    for piece, scale in zip(codes, scales, strict=True):
        if chosen.float8 is not None:
            values = piece.view(chosen.float8[3]).float()
        elif FORMAT_BITS[received.format] == 8:
            values = piece.view(torch.int8).float()
        else:
            halves = torch.stack((piece & 15, piece >> 4), dim=1).flatten()[:n].to(torch.int32)
            values = torch.where(halves < 8, halves, halves - 16).float()
        total += values * scale.repeat_interleave(received.block)[:n]
    return (total * factor).to(dtype)


def _check(format: str, block: int) -> None:
    require_choice("format", format, FORMATS)
    if block not in BLOCKS:
        raise invalid("block", block, ", ".join(map(str, BLOCKS)))


def _padded(flat: Tensor, block: int) -> Tensor:
    """``flat`` as rows of ``block``, the last one filled up with zeros."""
    return F.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def _float8_codes(v: Tensor, format: tuple[int, int, int, torch.dtype], random: Tensor | None) -> Tensor:
    """Codes of fp32 ``v``, in integers as the kernel does it."""
    mantissa, bias, largest_code, _ = format
    bits = v.view(torch.int32)
    sign, bits = bits >> 31 & 1, bits & 0x7FFFFFFF
    steps = v.abs() * 2.0 ** (bias - 1 + mantissa)
    if random is None:
        small = steps.round()
        large = bits + (1 << (22 - mantissa)) - 1 + (bits >> (23 - mantissa) & 1)
    else:
        small = (steps + random.float() / 65536).floor()
        large = bits + (random << (7 - mantissa))
    large = (large >> (23 - mantissa)) - ((127 - bias) << mantissa)
    code = torch.where(v.abs() < 2.0 ** (1 - bias), small.to(large.dtype), large)
    return sign << 7 | code.clamp(max=largest_code)


# ---- launchers --------------------------------------------------------------------------------------------------------


def _aligned(*tensors: tuple[Tensor, int]) -> bool:
    """Whether tensors (each with the bytes of an access) start, row by row, where whole accesses may."""
    return all(
        t.data_ptr() % access == 0 and (t.ndim < 2 or t.stride(0) * t.itemsize % access == 0) for t, access in tensors
    )


def _code_access(format: str, dtype: torch.dtype) -> int:
    """Bytes of codes that one access of 16 bytes of ``dtype`` makes or needs."""
    return 16 // dtype.itemsize * FORMAT_BITS[format] // 8


@functools.cache
def _quantize_kernel(
    format: str, block: int, dtype: torch.dtype, aligned: bool, stochastic: bool, device: torch.device
) -> Kernel:
    lanes = min(32, block * dtype.itemsize // 32)  # two accesses to a thread, or more
    return kernel(
        "quantize", "quantize", X_TYPE=type_name(dtype), FORMAT=FORMATS[format].code, BLOCK=block, LANES=lanes,
        ALIGNED=int(aligned), STOCHASTIC=int(stochastic), THREADS=chip(device).tile.threads,
    )  # fmt: skip


@loader.outside_compile
def _quantize(
    x: Tensor, format: str, block: int, seed: Tensor | None, into: tuple[Tensor, Tensor] | None = None
) -> Quantized:
    x = x.detach().contiguous()
    n = x.numel()
    codes, scales = into or (
        torch.empty(code_bytes(n, format), dtype=torch.uint8, device=x.device),
        torch.empty(ceil_div(n, block), dtype=torch.float32, device=x.device),
    )
    aligned = _aligned((x.view(-1), 16), (codes, _code_access(format, x.dtype)))
    compiled = _quantize_kernel(format, block, x.dtype, aligned, seed is not None, x.device)
    defines = dict(compiled.defines)
    threads, lanes = int(defines["THREADS"]), int(defines["LANES"])
    launch(compiled, ceil_div(scales.numel(), threads // lanes), threads, x, codes, scales, n, seed)
    return Quantized(codes, scales, n, format, block)


@functools.cache
def _dequantize_kernel(format: str, block: int, dtype: torch.dtype, aligned: bool, device: torch.device) -> Kernel:
    return kernel(
        "dequantize", "dequantize", X_TYPE=type_name(dtype), FORMAT=FORMATS[format].code, BLOCK=block,
        ALIGNED=int(aligned), UNROLL=_PIECES_AT_ONCE, THREADS=chip(device).tile.threads,
    )  # fmt: skip


@loader.outside_compile
def _dequantize(received: Quantized, dtype: torch.dtype, factor: float, out: Tensor | None = None) -> Tensor:
    codes, scales, n, format, block = received
    pieces = len(codes) if codes.ndim == 2 else 1
    codes, scales = (t.contiguous().view(pieces, t.shape[-1]) for t in (codes, scales))
    out = torch.empty(n, dtype=dtype, device=codes.device) if out is None else out
    aligned = _aligned((out, 16), (codes, _code_access(format, dtype)))
    compiled = _dequantize_kernel(format, block, dtype, aligned, codes.device)
    threads = chip(codes.device).tile.threads
    grid = ceil_div(n, 16 // dtype.itemsize * threads)
    launch(compiled, grid, threads, codes, scales, out, n, pieces, codes.stride(0), scales.stride(0), float(factor))
    return out
