"""Collectives whose tensors die soon after them, in memory that is being metered."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from runtime.context import current_ledger, has_data

_LONGEST_S = 1.0
"""So long at most is waited; then the meter may see a tensor too many, which the comparison with the forecast shows."""


class _LetGo:
    """Work that is over when nobody who did it still holds ``tensors``.

    gloo's threads let go of them a moment after they have said that they are done; a meter would see them alive by chance.
    """

    def __init__(self, begin: Callable[..., Any], tensors: tuple[Tensor, ...]) -> None:
        self._held = [(t.untyped_storage(), _holders(t)) for t in tensors]
        self._work = begin(*(t.detach() for t in tensors))  # tensors of their own, whose storages count them

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._work = None
        end = time.perf_counter() + _LONGEST_S
        for storage, before in self._held:
            while torch._C._storage_Use_Count(storage._cdata) > before and time.perf_counter() < end:
                time.sleep(0)
        self._held.clear()


def _holders(tensor: Tensor) -> int:
    storage = tensor.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata))


def started(begin: Callable[..., Any], *tensors: Tensor) -> Any:
    """What ``begin(*tensors)`` starts, to be waited for."""
    if current_ledger() is None or not has_data(tensors[0]) or tensors[0].is_cuda:
        return begin(*tensors)
    return _LetGo(begin, tensors)
