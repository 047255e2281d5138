"""``Ledger``: every live byte of a rank, with the category, pass and unit that it belongs to.

A dispatch mode sees each operator's outputs; a weak reference on their storage sees them die. Works on real and on
``meta`` tensors alike, so that ``fake`` and ``cpu`` runs are metered by the same code. Buffers that the runtime
manages itself (it empties and refills their storage) are reported by ``hold`` and ``release``.

Tracking slows the host down: time is never measured while a ledger is active.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from estimator.memory.reader import StepMemory
from estimator.schedule.events import Buffer

_PRODUCTS = frozenset((torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default))
"""Operators whose results may have as many elements as what they are made of, and are not made element by element."""
UNDECIDED = "undecided"
"""Allocated inside a forward pass: an activation if it outlives the pass, else a temporary."""


@dataclass(slots=True)
class Block:
    """One storage. ``scope`` is the pass (or replay) that made it; ``category`` may still be undecided."""

    n_bytes: int
    category: str
    host: bool
    scope: int
    passes_on: bool = True
    """Whether what is made of it element by element is of its category too, where that is ``logits_loss``."""
    managed: bool = False
    """Reported by ``Ledger.hold``: the program's, not the model's."""


@dataclass(slots=True)
class _Log:
    """What happened since ``start_step``: (block, delta) and changes of phase."""

    entries: list[tuple[Block, int] | tuple[str, str]] = field(default_factory=list)
    start: list[Block] = field(default_factory=list)
    start_phase: tuple[str, str] = ("init", "start")
    phase: tuple[str, str] = ("init", "start")


OnBirth = Callable[[int, Block], None]
"""Told the address and the block of every allocation that a ledger sees; the block's category may be decided later."""


class Ledger(TorchDispatchMode):
    """Meters allocations while active (``with ledger: ...``)."""

    def __init__(self, on_birth: OnBirth | None = None) -> None:
        super().__init__()
        self._on_birth = on_birth
        self._live: dict[int, Block] = {}
        self._refs: dict[int, weakref.ref] = {}
        self._held: dict[int, Block] = {}
        self._category: list[str] = ["temporaries"]
        self._host = False
        self._blind = False
        self._scope = 0
        self._open_scope = 0
        self._log = _Log()

    # ---- what the runtime says ------------------------------------------------------------------------------------

    def hold(self, key: int, buffer: Buffer, storage: torch.UntypedStorage | None = None) -> None:
        """A managed buffer now occupies its bytes, those of ``storage`` where that is told."""
        block = Block(buffer.n_bytes, buffer.category, buffer.place == "host", 0, managed=True)
        assert key not in self._held, f"{buffer} is held twice"
        self._held[key] = block
        if self._on_birth is not None and storage is not None:
            self._on_birth(storage.data_ptr(), block)
        self._log.entries.append((block, block.n_bytes))

    def release(self, key: int) -> None:
        """A managed buffer gave its bytes back."""
        block = self._held.pop(key)
        self._log.entries.append((block, -block.n_bytes))

    def adopt(self, tensor: torch.Tensor, category: str) -> None:
        """``tensor``, made before this ledger was active, counts under ``category`` until it dies."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._live and storage._cdata not in self._held:
            self._take(storage, category)

    def enter(self, phase: str, where: str) -> None:
        """From now on bytes are counted under ``phase``; ``where`` names the unit and pass."""
        self._log.entries.append((phase, where))
        self._log.phase = (phase, where)

    def now(self) -> tuple[str, str] | None:
        """Phase and place under which bytes are counted; ``None`` where they are not (``blind``)."""
        return None if self._blind else self._log.phase

    def last_of_logits(self, tensor: torch.Tensor) -> None:
        """``tensor``, though of the loss, is no logits: what is made of it is not either."""
        block = self._live.get(tensor.untyped_storage()._cdata)
        if block is not None:
            block.passes_on = False

    @contextmanager
    def category(self, name: str) -> Iterator[None]:
        """Operators inside allocate under ``name``."""
        self._category.append(name)
        try:
            yield
        finally:
            self._category.pop()

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Operators inside allocate host memory."""
        before, self._host = self._host, True
        try:
            yield
        finally:
            self._host = before

    @contextmanager
    def blind(self) -> Iterator[None]:
        """Operators inside allocate memory that is reported otherwise."""
        before, self._blind = self._blind, True
        try:
            yield
        finally:
            self._blind = before

    def open_scope(self) -> None:
        """A forward pass (or a replay of one) begins: its allocations are activations or temporaries."""
        self._scope += 1
        self._open_scope = self._scope
        self._category.append(UNDECIDED)

    def close_scope(self) -> None:
        """The pass is over: what is still alive is an activation. Nothing, where none is open."""
        if not self._open_scope:
            return
        for block in self._live.values():
            if block.scope == self._open_scope and block.category == UNDECIDED:
                block.category = "activations"
        self._open_scope = 0
        self._category.remove(UNDECIDED)

    # ---- what torch does ------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in () if self._blind else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf, () if func in _PRODUCTS else args)
        return out

    def _see(self, tensor: torch.Tensor, args: tuple) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._held or storage.nbytes() == 0:
            return
        category = self._category[-1]
        if self._descends_from_logits(tensor, args):
            category = "logits_loss"
        self._take(storage, category)

    def _take(self, storage: torch.UntypedStorage, category: str) -> None:
        key = storage._cdata
        block = Block(storage.nbytes(), category, self._host, self._open_scope)
        self._live[key] = block
        if self._on_birth is not None:
            self._on_birth(storage.data_ptr(), block)
        self._refs[key] = weakref.ref(storage, self._forget(key))
        self._log.entries.append((block, block.n_bytes))

    def _descends_from_logits(self, tensor: torch.Tensor, args: tuple) -> bool:
        """A tensor made element by element from logits is logits too (their copies and gradients)."""
        if self._category[-1] != "temporaries":
            return False
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.numel() == tensor.numel() > 1:
                source = self._live.get(arg.untyped_storage()._cdata)
                if source is not None and source.category == "logits_loss" and source.passes_on:
                    return True
        return False

    def _forget(self, key: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            block = self._live.pop(key)
            del self._refs[key]
            if block.category == UNDECIDED:
                block.category = "temporaries"
            self._log.entries.append((block, -block.n_bytes))

        return gone

    # ---- what it adds up to ---------------------------------------------------------------------------------------

    def start_step(self) -> None:
        """Forget the past; what is live now is the baseline of the step that begins."""
        phase = self._log.phase
        self._log = _Log(start=[*self._live.values(), *self._held.values()], start_phase=phase, phase=phase)

    def passes(self) -> Iterator[tuple[str, str, list[tuple[str, int]]]]:
        """Since ``start_step``: every stretch between two calls of ``enter`` as phase, place, and what the model itself (not the
        program) then allocated and freed on the device, category and bytes by turns."""
        phase, where = self._log.start_phase
        changes: list[tuple[str, int]] = []
        for entry in self._log.entries:
            if isinstance(entry[0], str):
                yield phase, where, changes
                (phase, where), changes = entry, []  # type: ignore[assignment]
            elif not (entry[0].managed or entry[0].host):
                changes.append((entry[0].category, entry[1]))  # type: ignore[arg-type]
        yield phase, where, changes

    def report(self) -> StepMemory:
        """Peaks since ``start_step``. Only device bytes count towards the peak."""
        live: dict[str, int] = {}
        host: dict[str, int] = {}
        for block in self._log.start:
            side = host if block.host else live
            side[block.category] = side.get(block.category, 0) + block.n_bytes
        total, host_total = sum(live.values()), sum(host.values())
        peak, host_peak, at_peak = total, host_total, dict(live)
        phase, where = peak_phase, peak_where = self._log.start_phase
        category_peak, host_category_peak = dict(live), dict(host)
        phase_peak, phase_categories = {"init": total, phase: total}, {"init": dict(live), phase: dict(live)}
        for entry in self._log.entries:
            if isinstance(entry[0], str):
                phase, where = entry  # type: ignore[assignment]
                if total > phase_peak.get(phase, -1):
                    phase_peak[phase], phase_categories[phase] = total, dict(live)
                continue
            block, delta = entry
            side, side_peak = (host, host_category_peak) if block.host else (live, category_peak)
            value = side.get(block.category, 0) + delta  # type: ignore[operator]
            side[block.category] = value
            side_peak[block.category] = max(side_peak.get(block.category, 0), value)
            if block.host:
                host_total += delta  # type: ignore[operator]
                host_peak = max(host_peak, host_total)
                continue
            total += delta  # type: ignore[operator]
            if total > phase_peak.get(phase, -1):
                phase_peak[phase], phase_categories[phase] = total, dict(live)
            if total > peak:
                peak, at_peak, peak_phase, peak_where = total, dict(live), phase, where
        return StepMemory(
            peak_bytes=peak,
            peak_phase=peak_phase,
            peak_where=peak_where,
            category_bytes_at_peak={k: v for k, v in at_peak.items() if v},
            category_peak_bytes={k: v for k, v in category_peak.items() if v},
            phase_peak_bytes=phase_peak,
            phase_category_bytes={
                phase: {k: v for k, v in held.items() if v} for phase, held in phase_categories.items()
            },
            host_peak_bytes=host_peak,
            host_category_peak_bytes={k: v for k, v in host_category_peak.items() if v},
        )
