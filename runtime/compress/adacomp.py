"""AdaComp's messages: entries, a count for each bin, one scale."""

from __future__ import annotations

import torch
from torch import Tensor

from estimator.schedule.events import Pack, Unpack
from estimator.sharding.layout import ADACOMP_BIN, ADACOMP_SHARE
from runtime.context import has_data
from runtime.kernels.adacomp import AdaCompMessage, adacomp_add, adacomp_pack

_DTYPES = {"codes": torch.int16, "counts": torch.int32, "scales": torch.float32}


def pack(event: Pack, tensors: dict[str, Tensor]) -> None:
    """Choose from the event's source and its ``error``, where the rest stays."""
    source, error = tensors[event.source], tensors[event.error or ""]
    if not has_data(source):
        return  # how many are chosen is a matter of their values
    entries, counts, scale = (tensors[part].view(dtype) for part, dtype in _DTYPES.items())
    adacomp_pack(source, error, ADACOMP_BIN, event.numel // ADACOMP_SHARE, into=(entries, counts, scale))


def unpack(event: Unpack, tensors: dict[str, Tensor]) -> None:
    """The event's target becomes the sum of all ranks' messages, added in the order of ranks in fp32."""
    target = tensors[event.target]
    if not has_data(target):
        return
    total = tensors.get("partial_sum", target).zero_()
    received = [tensors[f"received_{part}"].view(dtype).view(event.pieces, -1) for part, dtype in _DTYPES.items()]
    for entries, counts, scale in zip(*received, strict=True):
        adacomp_add(AdaCompMessage(entries, counts, scale, event.numel, ADACOMP_BIN), total)
    if total is not target:
        target.copy_(total)
