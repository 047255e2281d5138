"""A module and its example batch without their data."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from estimator.errors import InputError


class Whole(nn.Module):
    """A module that has parameters of its own, as one unit."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def without_data(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of ``module`` in training mode on ``device`` (``meta``, or a CPU inside ``FakeTensorMode``), with fp32 parameters.

    The module itself is left alone, and its data is not copied. Raises ``InputError`` where it cannot be copied.
    """
    made: dict[int, Any] = {}
    for part in module.modules():
        for value in (*part._parameters.values(), *part._buffers.values(), *vars(part).values()):
            if isinstance(value, Tensor) and id(value) not in made:
                made[id(value)] = _empty(value, device)
    try:
        copied = copy.deepcopy(module, made)
    except Exception as error:  # whatever a module holds
        raise InputError(f"module {type(module).__name__} cannot be copied: {first_line(error)}") from None
    own = next(copied.named_parameters(recurse=False), None)
    return (Whole(copied) if own is not None else copied).train()


def _empty(tensor: Tensor, device: torch.device) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if not tensor.is_floating_point():
        raise InputError(
            f"module has a parameter of dtype {str(tensor.dtype).removeprefix('torch.')}; allowed: floating point"
        )
    return nn.Parameter(torch.empty(tensor.shape, dtype=torch.float32, device=device), tensor.requires_grad)


def like_batch(batch: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors of ``batch`` (a tensor, or a tuple, list or dictionary of them) made anew; floating point ones in ``dtype``."""

    def make(x: Tensor) -> Tensor:
        return torch.empty(x.shape, dtype=dtype if x.is_floating_point() else x.dtype, device=device)

    return tree_map_only(Tensor, make, batch)


def first_line(error: BaseException) -> str:
    """What ``error`` says, on one line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".")
