"""Models whose parameters have a device, a shape and no memory, to be filled where they come to lie.

A model of which one rank holds a part may not fit its device as a whole.
"""

from __future__ import annotations

import torch
from torch import nn


def hollow(model: nn.Module, device: torch.device) -> None:
    """Move ``model``, built on ``meta``, to ``device``: parameters without memory, buffers uninitialised. Sharing is kept."""
    with torch.no_grad():
        for param in model.parameters():
            values = torch.empty_like(param, device=device)
            values.untyped_storage().resize_(0)
            hollowed = nn.Parameter(values, requires_grad=param.requires_grad)
            hollowed.__dict__.update(param.__dict__)  # what its makers say of it
            torch.utils.swap_tensors(param, hollowed)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty_like(buffer, device=device))
