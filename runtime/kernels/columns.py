"""Second stage of weight and bias gradients: sums of fp32 partial rows, the same bits every time."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from runtime.kernels.loader import Kernel, ceil_div, kernel, launch, type_name


@functools.cache
def _kernel(dtype: torch.dtype) -> Kernel:
    return kernel("columns", "sum_columns", OUT_TYPE=type_name(dtype))


def sum_columns(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """``partial`` ``[P, W]`` fp32, contiguous; returns its sum over P, ``[W]`` of ``dtype``."""
    rows, width = partial.shape
    out = torch.empty(width, dtype=dtype, device=partial.device)
    launch(_kernel(dtype), ceil_div(width, 32), 1024, partial, out, rows, width)
    return out
