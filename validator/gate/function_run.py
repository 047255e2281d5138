"""One run of a function of the user's own: seconds of a call, the machine's speed between calls, and live bytes."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from estimator.errors import InputError, unknown_choice
from validator import provenance
from validator.measure.yardstick import Yardstick

SHORTEST_SAMPLE_S = 2e-3
"""Faster functions are called several times per sample, or the clock and the loop would be timed."""


@dataclass(frozen=True, kw_only=True)
class FunctionReport:
    """What one process measured of one function."""

    name: str
    step_s: float
    """Median seconds of one call."""
    peak_allocated_bytes: int | None = None
    """Largest number of live bytes of torch tensors during one call; ``None`` where torch was not used. On a GPU the caching
    allocator's count, else that of the tensors on the host, those from before the call included."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> FunctionReport:
        """Inverse of ``to_dict``. Raises ``InputError`` on an unknown or a missing key."""
        names = {f.name for f in fields(cls)}
        for key in data:
            if key not in names:
                raise unknown_choice("function record field", key, names)
        for key in ("name", "step_s"):
            if key not in data:
                raise InputError(f"the function record has no field {key!r}")
        return cls(**data)


def measure_function(
    name: str, step: Callable[[], object], *, steps: int = 8, warmup: int = 3, tree: Path = Path()
) -> FunctionReport:
    """Times ``step()`` in this process: ``steps`` samples after ``warmup`` calls, each followed by the yardstick. ``tree``
    is the git checkout that the function is from.

    The yardstick and live bytes need torch, and are taken only when ``step`` has imported it. Once CUDA is in use, the device
    is waited for around each sample, its allocator counts the bytes, and there is no yardstick.
    """
    for _ in range(warmup):
        step()
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and torch.cuda.is_initialized()
    wait: Callable[[], object] = torch.cuda.synchronize if torch is not None and on_gpu else lambda: None
    yardstick = Yardstick() if torch is not None and not on_gpu else None
    start = _seconds_of(step, 1, wait)
    calls = max(1, round(SHORTEST_SAMPLE_S / max(start, 1e-9)))
    seconds, measured = [], []
    for _ in range(steps):
        seconds.append(_seconds_of(step, calls, wait) / calls)
        if yardstick is not None:
            measured.append(yardstick.seconds(seconds[-1] * calls))
    facts: dict[str, Any] = {"steps": steps, "warmup": warmup, "calls_per_step": calls, "step_seconds": seconds}
    facts |= {} if yardstick is None else {"yardstick": yardstick.name, "yardstick_seconds": measured}
    del yardstick  # its tensors are not the function's
    peak = None if torch is None else _peak_on_gpu(torch, step) if on_gpu else _peak_on_host(step)
    return FunctionReport(
        name=name,
        step_s=statistics.median(seconds),
        peak_allocated_bytes=peak,
        provenance={**provenance.collect(with_torch=torch is not None), "git": provenance.git_state(tree), **facts},
    )


def _seconds_of(step: Callable[[], object], calls: int, wait: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    wait()
    return time.perf_counter() - start


def _peak_on_gpu(torch: Any, step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())


def _peak_on_host(step: Callable[[], object]) -> int:
    """Peak of one further call under a ledger that first adopts every tensor that Python can reach."""
    import torch

    from runtime.ledger import Ledger

    gc.collect()
    ledger = Ledger()
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            ledger.adopt(thing, "temporaries")
            if thing.grad is not None:
                ledger.adopt(thing.grad, "temporaries")
    with ledger:
        ledger.start_step()
        step()
        return ledger.report().peak_bytes
