"""A ``torch.cuda`` whose streams are clocks: enough to test, without a GPU, what is timed on which stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FakeCuda:
    """Seconds pass on the host (``host_s``) and on each stream (``Stream.ready_s``: when its issued work is done)."""

    def __init__(self) -> None:
        self.host_s = 0.0
        self.synchronisations = 0
        cuda = self

        class Stream:
            def __init__(self, _device: Any = None) -> None:
                self.ready_s = 0.0

            def run(self, seconds: float) -> None:
                """A kernel or copy, issued now."""
                self.ready_s = max(self.ready_s, cuda.host_s) + seconds

            def wait_stream(self, other: Stream) -> None:
                self.ready_s = max(self.ready_s, other.ready_s)

            def wait_event(self, event: Event) -> None:
                self.ready_s = max(self.ready_s, event.time_s)

            def synchronize(self) -> None:
                cuda.host_s = max(cuda.host_s, self.ready_s)

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                self.timed = enable_timing

            def record(self) -> None:
                self.time_s = max(cuda.current.ready_s, cuda.host_s)
                cuda.current.ready_s = self.time_s

            def synchronize(self) -> None:
                cuda.synchronisations += 1
                cuda.host_s = max(cuda.host_s, self.time_s)

            def elapsed_time(self, end: Event) -> float:
                assert self.timed and end.timed and cuda.host_s >= end.time_s, "read before the device was there"
                return 1e3 * (end.time_s - self.time_s)

        self.Stream, self.Event = Stream, Event
        self.current = Stream()

    def current_stream(self) -> Any:
        return self.current

    @contextmanager
    def stream(self, side: Any) -> Iterator[None]:
        before, self.current = self.current, side
        try:
            yield
        finally:
            self.current = before


class FakeCopy:
    """Takes the place of a tensor that is copied to in ``seconds`` of the current stream."""

    def __init__(self, cuda: FakeCuda, seconds: float) -> None:
        self.cuda, self.seconds = cuda, seconds

    def copy_(self, _source: Any, non_blocking: bool) -> None:
        assert non_blocking
        self.cuda.current.run(self.seconds)
