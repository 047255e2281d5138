"""Parameters of which each of several ranks holds a part (``estimator.sharding.units.Split``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from estimator.job.mesh import Span
from estimator.sharding.units import Split
from runtime.comm import Communicator


class Sharers(Protocol):
    """The ranks that share a parameter, and which of them this one is."""

    comm: Communicator
    span: Span
    place: int


@torch.no_grad()
def fill_part(
    name: str, param: Tensor, split: Split, ranks: Sharers, values: Callable[[str, Tensor], None]
) -> None:  # fmt: skip
    """Write this rank's part of the values of parameter ``name`` into ``param``, zeros where there is nothing; ``values`` writes
    all of them."""
    whole_shape = (*param.shape[: split.dim], split.size, *param.shape[split.dim + 1 :])
    whole = torch.empty(whole_shape, dtype=param.dtype, device=param.device)
    values(name, whole)
    n = param.shape[split.dim]
    own = whole.narrow(split.dim, ranks.place * n, min(n, split.size - ranks.place * n))
    param.zero_().narrow(split.dim, 0, own.shape[split.dim]).copy_(own)


def join_parts(own: Tensor, split: Split, ranks: Sharers) -> Tensor:
    """All of a parameter of which this rank holds ``own``. A collective call."""
    size = ranks.span.size
    parts = torch.empty(size * own.numel(), dtype=own.dtype, device=own.device)
    ranks.comm.gather_now(parts, own.reshape(-1), ranks.span)
    return torch.cat(parts.view(size, *own.shape).unbind(0), split.dim).narrow(split.dim, 0, split.size)
