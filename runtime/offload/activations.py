"""Inputs of blocks that recompute, in pinned host memory between their forward and their backward pass.

``estimator.schedule.activations`` says when each leaves and comes back. Where a checkpoint would keep such an input it keeps its
place here instead (``keeping``), and gets the tensor that has been brought back by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from estimator.schedule.activations import AWAY
from estimator.schedule.events import Buffer
from runtime.context import current_ledger, managed_memory
from runtime.ledger import Ledger
from runtime.streams import SideStreams

_Place = tuple[int, int]
"""A unit, and which of its inputs."""


class BlockInputs:
    """Inputs of ``units`` (indices): all tensors that a unit's ``forward`` is given and that have a gradient."""

    def __init__(self, units: Iterable[int], device: torch.device) -> None:
        self.units, self._device = frozenset(units), device
        self._host = torch.device("meta") if device.type == "meta" else torch.device("cpu")
        self._here: dict[int, list[Tensor | None]] = {}
        """On the device: before they have left, and from when they are sent for until backward takes them."""
        self._away: dict[int, list[Tensor]] = {}
        self._entering: int | None = None

    # ---- what the model does --------------------------------------------------------------------------------------

    def offer(self, unit: int, given: Any) -> None:
        """``unit`` is about to run forward on ``given`` (arguments, perhaps nested)."""
        self._entering = unit if unit in self.units else None
        if self._entering is not None:
            tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]
            self._here[unit] = [x.detach() for x in tensors]

    def keeping(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` of a block; what it keeps of its inputs is kept here."""

        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(self._pack, self._unpack):
                return forward(*args, **kwargs)

        return run

    def _pack(self, tensor: Tensor) -> Tensor | _Place:
        if self._entering is not None:
            for i, known in enumerate(self._here[self._entering]):
                if known is not None and tensor.untyped_storage()._cdata == known.untyped_storage()._cdata:
                    return self._entering, i
        return tensor

    def _unpack(self, packed: Tensor | _Place) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        unit, i = packed
        here = self._here[unit]
        tensor, here[i] = here[i], None  # from now on it lives as long as backward needs it
        assert tensor is not None, "an input is taken once"
        return tensor

    # ---- what the program says ------------------------------------------------------------------------------------

    def leave(self, unit: int, streams: SideStreams) -> tuple[int, Any]:
        """Start copying to the host; bytes, and a handle to wait for."""
        inputs = [x for x in self._here[unit] if x is not None]
        rooms = self._rooms(unit, inputs)
        return self._copied("d2h", inputs, rooms, streams)

    def drop(self, unit: int) -> None:
        """Give the device's memory back."""
        del self._here[unit]

    def expect(self, unit: int) -> None:
        """Make room on the device again."""
        ledger = current_ledger()
        with ledger.category("activations") if ledger is not None else nullcontext():
            self._here[unit] = [torch.empty_like(x, device=self._device) for x in self._away[unit]]

    def come_back(self, unit: int, streams: SideStreams) -> tuple[int, Any]:
        """Start copying to the device; bytes, and a handle to wait for."""
        here = [x for x in self._here[unit] if x is not None]
        return self._copied("h2d", self._away[unit], here, streams)

    @staticmethod
    @torch.no_grad()
    def _copied(way: str, sources: list[Tensor], targets: list[Tensor], streams: SideStreams) -> tuple[int, Any]:
        n_bytes, done = 0, None
        for source, target in zip(sources, targets, strict=True):
            done = streams.copy(way, source, target)  # one after another: who waits for the last waits for all
            n_bytes += source.numel() * source.element_size()
        return n_bytes, done

    # ---- host memory ----------------------------------------------------------------------------------------------

    def _rooms(self, unit: int, inputs: list[Tensor]) -> list[Tensor]:
        """Host memory for ``inputs``, kept from step to step as long as they have the same shapes."""
        rooms = self._away.get(unit, [])
        if [(x.shape, x.dtype) for x in rooms] != [(x.shape, x.dtype) for x in inputs]:
            ledger = current_ledger()
            for room in rooms if ledger is not None else ():
                ledger.release(room.untyped_storage()._cdata)  # type: ignore[union-attr]
            pinned = self._device.type == "cuda"
            with managed_memory():
                rooms = [torch.empty(x.shape, dtype=x.dtype, device=self._host, pin_memory=pinned) for x in inputs]
            self._away[unit] = rooms
            if ledger is not None:
                self._meter(unit, ledger)
        return rooms

    def meter(self, ledger: Ledger) -> None:
        """Report all host memory to ``ledger``."""
        for unit in self._away:
            self._meter(unit, ledger)

    def _meter(self, unit: int, ledger: Ledger) -> None:
        for room in self._away[unit]:
            storage = room.untyped_storage()
            ledger.hold(storage._cdata, Buffer(AWAY, unit, "activations", storage.nbytes(), "host"), storage)
