"""Obeys ``Pack`` and ``Unpack``: kernels on GPUs, their references elsewhere (whose scratch memory is not counted)."""

from __future__ import annotations

import torch
from torch import Tensor

from estimator.schedule.events import Pack, Unpack
from estimator.sharding.layout import BLOCK_NUMEL
from runtime.compress import adacomp
from runtime.kernels.one_bit import Signs, one_bit_pack, one_bit_sum
from runtime.kernels.quantize import Quantized, dequantize_sum, quantize
from runtime.storage import GroupStorage

PARTS = ("codes", "scales")


def pack(event: Pack, storage: GroupStorage) -> None:
    """Fill ``codes`` and ``scales`` from the event's source, which stays as it is; what is lost goes into its ``error``."""
    tensors = storage.tensors
    if event.codec == "adacomp":
        adacomp.pack(event, tensors)
        return
    source = tensors[event.source]
    assert source.numel() == event.numel
    made = [tensors[part if event.rows == 1 else f"unordered_{part}"] for part in PARTS]
    block, into = BLOCK_NUMEL[event.codec], (made[0], made[1].view(torch.float32))
    if event.error is not None:
        one_bit_pack(source, tensors[event.error], block, into)
    else:
        quantize(source, event.codec, block, None, into)
    if event.rows > 1:
        for part, unordered in zip(PARTS, made, strict=True):
            _put_in_order(tensors[part], unordered, event)


def _put_in_order(sent: Tensor, made: Tensor, event: Pack) -> None:
    """Shards in the order of ranks become, for each part, those of the ranks that it is on the way to."""
    rows = made.view(event.rows, event.parts, -1)
    sent.view(event.parts, event.rows, -1).copy_(rows.transpose(0, 1))


def unpack(event: Unpack, storage: GroupStorage) -> None:
    """Fill the event's target with the sum of what was received."""
    tensors = storage.tensors
    if event.codec == "adacomp":
        adacomp.unpack(event, tensors)
        return
    target = storage.own_full_grads if event.target == "own_grads" else tensors[event.target]
    assert target.numel() == event.numel
    codes, scales = (tensors[f"received_{part}"].view(event.pieces, -1) for part in PARTS)
    block, numbers = BLOCK_NUMEL[event.codec], scales.view(torch.float32)
    if event.codec == "one_bit":
        one_bit_sum(Signs(codes, numbers, event.numel, block), target.dtype, out=target)
    else:
        dequantize_sum(Quantized(codes, numbers, event.numel, event.codec, block), target.dtype, out=target)
