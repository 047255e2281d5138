"""``PartClock``: where the seconds of a step go, read without making host and device wait for each other.

Marks are set where one part ends and the next begins, and read after the step. On a GPU a mark is an event on the
compute stream, so that a part is what that stream spent on it, stalls included; elsewhere it is the host's clock.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

WAIT_PART = {
    "gather": "exposed_gather",
    "reduce": "exposed_reduce",
    "cross": "exposed_reduce",
    "push": "exposed_reduce",
    "grad_norm": "exposed_other_comm",
    "recv_activations": "pipeline_bubble",
    "recv_gradients": "pipeline_bubble",
    "send_activations": "exposed_other_comm",
    "send_gradients": "exposed_other_comm",
}
"""Which part a wait is, by the verb of its tag; others are ``offload``."""
WAIT_PART |= {
    f"{verb}_{part}": WAIT_PART[verb]
    for verb in ("gather", "reduce", "cross")
    for part in ("codes", "counts", "scales", "ids", "rows")
}
EXCHANGE_PART = {"params": "exposed_gather", "grads": "exposed_reduce"}
"""Which part it is to make and to read messages, by purpose."""


class PartClock:
    """Seconds by part since ``start``. Parts nest: an inner part's seconds are not the outer one's."""

    def __init__(self, device: torch.device, cuda: Any = None) -> None:
        """``cuda`` stands in for ``torch.cuda`` in tests."""
        self._cuda = (cuda or torch.cuda) if device.type == "cuda" else None
        self._open: list[str] = []
        self._marks: list[tuple[Any, str | None]] = []
        """Each mark with the part that begins there; ``None``: none does."""

    def start(self) -> None:
        """Forget the past."""
        self._marks.clear()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is issued to the compute stream inside (elsewhere: what the host does) belongs to ``name``."""
        self._open.append(name)
        self._marks.append((self.mark(), name))
        try:
            yield
        finally:
            self._open.pop()
            self._marks.append((self.mark(), self._open[-1] if self._open else None))

    def mark(self) -> Any:
        """A point in time, for ``between``."""
        return time.perf_counter() if self._cuda is None else timed_event(self._cuda)

    def between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to a later one; waits for the device to reach it."""
        if self._cuda is None:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def read(self) -> dict[str, float]:
        """Seconds by part; waits for the device to reach the last mark."""
        seconds: defaultdict[str, float] = defaultdict(float)
        if self._cuda is not None and self._marks:
            self._marks[-1][0].synchronize()
        for (mark, name), (following, _) in zip(self._marks, self._marks[1:], strict=False):
            if name is not None:
                seconds[name] += self.between(mark, following)
        return dict(seconds)


def timed_event(cuda: Any) -> Any:
    """An event on the current stream of ``cuda`` that remembers its time."""
    event = cuda.Event(enable_timing=True)
    event.record()
    return event
