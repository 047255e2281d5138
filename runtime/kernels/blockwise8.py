"""Numbers in 8 bits, in blocks of 256 with the greatest magnitude of each block: the optimizer's 8-bit moments.

The map is the dynamic one of Dettmers et al. 2022 (sections 1.3 and 2.2), as bitsandbytes' ``create_dynamic_map`` builds it. With sign: 0, 1 and,
for i from 0 to 6, plus and minus the middles of 2^i equal parts of [0.1, 1] times 10^(i-6). Without sign: 0, 1 and the
middles of 2^(i+1) parts. Numbers are divided by their block's greatest magnitude and take the nearest value; one
difference: a positive number without sign never becomes 0 (unless it is below 2^-126 of the greatest), so that a small second
moment cannot vanish under a first moment that stays.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from estimator.errors import invalid
from estimator.ops.kernels.optimizer import STATE_BLOCK as BLOCK
from runtime.context import managed_memory
from runtime.kernels.loader import ceil_div

_SMALLEST_NORMAL = 2.0**-126


class Blockwise8(NamedTuple):
    """A tensor in 8 bits."""

    codes: Tensor
    """uint8, of the tensor's shape: indices into the sorted map."""
    absmax: Tensor
    """fp32 ``[ceil(numel / 256)]``: greatest magnitude of each block."""


def zeros8(like: Tensor) -> Blockwise8:
    """A tensor of zeros, of the shape and on the device of ``like``."""
    absmax = torch.zeros(ceil_div(like.numel(), BLOCK), dtype=torch.float32, device=like.device)
    return Blockwise8(torch.zeros(like.shape, dtype=torch.uint8, device=like.device), absmax)


def encode(x: Tensor, *, signed: bool) -> Blockwise8:
    """``x`` (any shape, fp32; read without its sign unless ``signed``) in 8 bits. In plain torch."""
    padded = torch.nn.functional.pad(x.float().flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = torch.where(padded.isnan(), 0, padded.abs()).amax(1) if len(padded) else padded.new_zeros(0)
    inverse = torch.where(absmax >= _SMALLEST_NORMAL, 1 / absmax, 0)
    unit = padded * inverse[:, None]
    map_ = _maps()[0 if signed else 1]
    magnitude = unit.abs()
    at = torch.bucketize(magnitude.nan_to_num(0), map_.threshold[1:], right=True)
    if not signed:
        at = torch.where((unit > 0) & (at == 0), 1, at)
    slope, shift, first, last = map_.encoding[at].unbind(-1)
    part = (magnitude.double() * slope + shift).float().floor()  # rounded once, as by a fused multiply-add
    k = (first + part.nan_to_num(0).clamp(min=0).minimum(last)).long()
    codes = torch.where(unit < 0, 127 - k.clamp(max=127), 127 + k) if signed else k - 1
    return Blockwise8(codes.to(torch.uint8).flatten()[: x.numel()].view(x.shape), absmax)


def decode(x: Blockwise8, *, signed: bool) -> Tensor:
    """fp32, of ``x.codes``'s shape. In plain torch."""
    scale = x.absmax.repeat_interleave(BLOCK)[: x.codes.numel()].view(x.codes.shape)
    return map_values(signed).to(x.codes.device)[x.codes.long()] * scale


@functools.cache
def map_values(signed: bool) -> Tensor:
    """The 256 values of the map in ascending order, fp32 on the CPU; a code is an index into it."""
    codes = torch.arange(256)
    k = (codes - 127).abs() if signed else codes + 1
    decade = torch.frexp(k.double()).exponent.long() - (0 if signed else 1)
    value, offset = _maps()[0 if signed else 1].decoding[decade].double().unbind(-1)
    magnitude = (k + 0.5) * value + offset
    return (torch.where(codes < 127, -magnitude, magnitude) if signed else magnitude).float()


class _Map(NamedTuple):
    """``Map`` of ``blockwise8.cuh``."""

    encoding: Tensor
    decoding: Tensor
    threshold: Tensor


@functools.cache
def _maps() -> tuple[_Map, _Map]:
    return _map(True), _map(False)


def _map(signed: bool) -> _Map:
    """Decade d = 1 to 7 holds s (0.1 + 0.9 (k - n + 1/2) / n) for k from n to 2n - 1, with s = 10^(d-7) and n parts."""
    encoding, decoding, threshold = [(0.0, 0.0, 0.0 if signed else 1.0, 0.0)], [(0.0, 0.0)], [0.0]
    for d in range(1, 8):
        parts, scale = 2 ** (d - 1 if signed else d), 10.0 ** (d - 7)
        encoding.append((parts / (0.9 * scale), -parts / 9, parts, parts - 1))
        decoding.append((0.9 * scale / parts, -0.8 * scale))
        threshold.append(scale / 10 * (1 + 1.8 / parts) if d > 1 else scale * (0.05 + 0.225 / parts))
    top = 128 if signed else 256
    encoding.append((0.0, 0.0, top, 0.0))
    decoding.append((0.0, 1.0))
    threshold.append(1 - 0.225 / (64 if signed else 128))
    return _Map(*(torch.tensor(rows, dtype=torch.float32) for rows in (encoding, decoding, threshold)))


@functools.cache
def device_maps(device: torch.device) -> Tensor:
    """Both maps as the kernels read them: fp32 ``[2, 64]`` on ``device``."""
    with managed_memory():  # kept as long as the process
        rows = [torch.cat((m.encoding.flatten(), m.decoding.flatten(), m.threshold, torch.zeros(1))) for m in _maps()]
        return torch.stack(rows).to(device)


def check8(x: Blockwise8, name: str) -> None:
    """Raises ``InputError`` unless ``x``'s two tensors belong together."""
    if x.codes.dtype != torch.uint8 or x.absmax.dtype != torch.float32:
        raise invalid(f"dtypes of {name}", (x.codes.dtype, x.absmax.dtype), "uint8 codes and fp32 magnitudes")
    if x.absmax.numel() != ceil_div(x.codes.numel(), BLOCK):
        raise invalid(f"number of magnitudes of {name}", x.absmax.numel(), f"{ceil_div(x.codes.numel(), BLOCK)}")
