"""``AllocatorHistory``: what CUDA's caching allocator does while a step is metered, named by the ledger."""

from __future__ import annotations

from dataclasses import asdict
from types import TracebackType
from typing import Any

import torch

from estimator.errors import InputError
from estimator.memory.recorded import replay_recorded, settings_of
from runtime.ledger import Block
from runtime.snapshot import Named, attribute


class AllocatorHistory:
    """Records while active (``with history: ...``); hand ``note`` to the ledger as ``on_birth``.

    Works with PyTorch's own caching allocator alone: others keep no history.
    """

    def __init__(self, cuda: Any = None) -> None:
        """``cuda`` stands in for ``torch.cuda`` in tests. The current device is recorded."""
        self._cuda = cuda or torch.cuda
        self._notes: list[tuple[int, int, Block]] = []
        self._before: list[Any] = []
        self._trace: list[Any] = []
        self._n_before = 0
        self._options: dict[str, Any] = {}

    def __enter__(self) -> AllocatorHistory:
        self._cuda.synchronize()
        snapshot = self._cuda.memory._snapshot()
        self._options = {"allocator_settings": snapshot.get("allocator_settings", {})}
        self._before = self._segments(snapshot)
        self._n_before = self._n_allocations()
        self._cuda.memory._record_memory_history("all", context=None, clear_history=True)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:
                self._cuda.synchronize()
                self._trace = self._cuda.memory._snapshot()["device_traces"][self._cuda.current_device()]
        finally:
            self._cuda.memory._record_memory_history(None)

    def note(self, address: int, block: Block) -> None:
        """The ledger sees a tensor at ``address``: the allocator has just made it, or made it earlier."""
        if not block.host:
            self._notes.append((self._n_allocations() - self._n_before, address, block))

    def attribution(self) -> dict[str, Any]:
        """``runtime.snapshot.attribute`` of what was recorded; the ledger must have made up its mind on every block. Beside it, as
        ``simulated``, how the estimator's simulator of the allocator fares with the same requests, or why it does not."""
        named = [Named(n_before, address, block.category) for n_before, address, block in self._notes]
        return {**attribute(self._before, self._trace, named), "simulated": self._simulated()}

    def _simulated(self) -> dict[str, Any]:
        try:
            settings = settings_of(self._options)
        except InputError as error:
            return {"refused": str(error)}
        return asdict(replay_recorded(self._before, self._trace, settings))

    def _segments(self, snapshot: dict[str, Any]) -> list[Any]:
        """The current device's."""
        device = self._cuda.current_device()
        return [s for s in snapshot["segments"] if s.get("device", device) == device]

    def _n_allocations(self) -> int:
        """Since the program began: what tells two tensors at one address apart."""
        return self._cuda.memory_stats_as_nested_dict()["allocation"]["all"]["allocated"]
