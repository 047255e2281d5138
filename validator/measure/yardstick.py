"""The yardstick: a fixed piece of work that says how fast the machine is at this moment.

On shared machines steps take 10 to 1000 % longer while neighbours are busy. A step's length in yardsticks that were timed right
after it, on the same threads, moves far less (``benchmarks/bench_gate.py --real`` measures by how much). torch is imported when
a yardstick is made, not before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

SHARE = 0.3
"""Part of the step's own time that is spent on the yardstick: a longer look sees more of what the step saw."""
MOST_REPEATS = 20
_ROWS, _NUMEL, _SMALL = 256, 1 << 20, 64


class Yardstick:
    """About 3 ms of what a training step is made of: fp32 matrix products, passes over memory, and many small operators.

    Allocates when made (9 MiB) and never again. All threads that torch uses take part and, where torch.distributed's default
    group is up, all its ranks at once, each piece ending when the slowest rank ends: as it is in a step.
    """

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        generator = torch.Generator().manual_seed(0)
        self._torch = torch
        self._a, self._b = (torch.randn(_ROWS, _ROWS, generator=generator) for _ in range(2))
        self._product = torch.empty_like(self._a)
        self._long, self._written = torch.randn(_NUMEL, generator=generator), torch.empty(_NUMEL)
        self._small, self._sum = torch.randn(_SMALL, generator=generator), torch.empty(_SMALL)
        self._repeats = torch.ones(1, dtype=torch.int64)
        self._ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.name = f"steplike-1, {self._ranks} x {torch.get_num_threads()} threads"
        """What was timed: only equal ones can be compared."""
        self._last_s = 1.0
        for _ in range(2):  # the first call starts threads
            self.seconds()

    def seconds(self, step_s: float = 0.0) -> float:
        """Mean wall-clock seconds of the piece, repeated to take about ``SHARE`` of a step of ``step_s`` seconds.

        Every rank of the group calls this; rank 0 says how often the piece is repeated.
        """
        dist = self._torch.distributed
        self._repeats.fill_(min(max(round(SHARE * step_s / self._last_s), 1), MOST_REPEATS))
        if self._ranks > 1:
            dist.broadcast(self._repeats, src=0)
            dist.barrier()
        repeats = int(self._repeats)
        start = time.perf_counter()
        with self._torch.no_grad():
            for _ in range(repeats):
                self._work()
                if self._ranks > 1:
                    dist.barrier()
        self._last_s = (time.perf_counter() - start) / repeats
        return self._last_s

    def _work(self) -> None:
        torch = self._torch
        for _ in range(4):
            torch.mm(self._a, self._b, out=self._product)
        for _ in range(2):
            torch.mul(self._long, 1.01, out=self._written)
        for _ in range(60):
            torch.add(self._small, self._small, out=self._sum)


def yardstick_median(provenance: Mapping[str, Any]) -> float | None:
    """Median of a record's ``yardstick_seconds``; ``None`` where none were timed."""
    seconds = _positive(provenance.get("yardstick_seconds"))
    return statistics.median(seconds) if seconds else None


def step_in_yardsticks(provenance: Mapping[str, Any]) -> float | None:
    """Median over the steps of a record of step seconds per yardstick seconds; ``None`` where it lacks either."""
    steps, yardsticks = (_positive(provenance.get(name)) for name in ("step_seconds", "yardstick_seconds"))
    if not steps or len(steps) != len(yardsticks):
        return None
    return statistics.median(step / one for step, one in zip(steps, yardsticks, strict=True))


def _positive(values: Any) -> Sequence[float]:
    """``values`` when it is a list of numbers above zero, else nothing."""
    fine = isinstance(values, list | tuple) and all(isinstance(v, int | float) and v > 0 for v in values)
    return values if fine else ()
