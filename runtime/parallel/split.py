"""Parameters of which each of several ranks holds a part (``estimator.sharding.units.Split``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from estimator.job.mesh import Span
from estimator.sharding.units import Split, splits_of
from runtime.comm import Communicator


class Sharers(Protocol):
    """The ranks that share a parameter, and which of them this one is."""

    comm: Communicator
    span: Span
    place: int


@torch.no_grad()
def fill_part(
    name: str, param: Tensor, split: Split | None, sharers: Callable[[Split], Sharers], values: Callable[[str, Tensor], None]
) -> None:  # fmt: skip
    """Write this rank's part of the values of parameter ``name`` into ``param``, zeros where there is nothing; ``values`` writes
    all of them."""
    if split is None:
        values(name, param)
        return
    parts, wholes = list(splits_of(split)), [param.shape]
    for part in reversed(parts):
        shape = wholes[-1]
        wholes.append(torch.Size((*shape[: part.dim], part.size, *shape[part.dim + 1 :])))
    own = torch.empty(wholes.pop(), dtype=param.dtype, device=param.device)
    values(name, own)
    for part, shape in zip(parts, reversed(wholes), strict=True):
        n, place = shape[part.dim], sharers(part).place
        own = own.narrow(part.dim, min(place * n, part.size), max(0, min(n, part.size - place * n)))
    param.zero_()[tuple(slice(n) for n in own.shape)].copy_(own)


def join_parts(own: Tensor, split: Split | None, sharers: Callable[[Split], Sharers]) -> Tensor:
    """All of a parameter of which this rank holds ``own``. A collective call."""
    for part in reversed(list(splits_of(split))):
        ranks = sharers(part)
        size = ranks.span.size
        parts = torch.empty(size * own.numel(), dtype=own.dtype, device=own.device)
        ranks.comm.gather_now(parts, own.reshape(-1).contiguous(), ranks.span)
        own = torch.cat(parts.view(size, *own.shape).unbind(0), part.dim).narrow(part.dim, 0, part.size)
    return own
