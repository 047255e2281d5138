"""The program's side streams: real CUDA streams on a GPU, nothing at all elsewhere."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from runtime.parts import timed_event


class SideStreams:
    """``gather``, ``reduce``, ``h2d``, ``d2h``, ``send`` and ``recv`` beside the compute stream.

    On the CPU (and on ``meta``) copies are done when ``copy`` returns and collectives run in gloo's own threads.
    """

    def __init__(self, device: torch.device, cuda: Any = None) -> None:
        """``cuda`` stands in for ``torch.cuda`` in tests."""
        self._cuda = (cuda or torch.cuda) if device.type == "cuda" else None
        names = ("gather", "reduce", "h2d", "d2h", "send", "recv") if self._cuda else ()
        self._streams = {name: self._cuda.Stream(device) for name in names}  # type: ignore[union-attr]
        self._copies: list[tuple[str, Any, Any]] = []
        """Direction, start and end of every copy since ``start_step``: events, or the host's seconds."""

    def on(self, name: str) -> AbstractContextManager[Any]:
        """Issue on side stream ``name``, after everything issued so far on the compute stream."""
        if self._cuda is None:
            return nullcontext()
        side = self._streams[name]
        side.wait_stream(self._cuda.current_stream())
        return self._cuda.stream(side)

    def start_step(self) -> None:
        """Forget the copies of the past."""
        self._copies.clear()

    def copy(self, name: str, source: Tensor, target: Tensor) -> Any:
        """Copy ``source`` to ``target`` (same size and dtype); returns a handle to wait for."""
        if self._cuda is None:
            start_s = time.perf_counter()
            target.copy_(source)
            self._copies.append((name, start_s, time.perf_counter()))
            return None
        with self.on(name):
            start = timed_event(self._cuda)
            target.copy_(source, non_blocking=True)
            done = timed_event(self._cuda)
        self._copies.append((name, start, done))
        return done

    def copy_seconds(self) -> dict[str, float]:
        """Seconds for which the copies since ``start_step`` occupied their streams, by direction.

        On a GPU this waits for the copies.
        """
        seconds: dict[str, float] = {}
        for name, start, end in self._copies:
            if self._cuda is not None:
                end.synchronize()
            elapsed = end - start if self._cuda is None else start.elapsed_time(end) / 1e3
            seconds[name] = seconds.get(name, 0.0) + elapsed
        return seconds

    def wait(self, name: str, work: Any) -> None:
        """Make stream ``name`` (``compute``: the current one, ``host``: this thread) wait for ``work``.

        ``work`` is a copy's handle or a collective in flight; ``None`` is done already.
        """
        if work is None:
            return
        side = self._streams.get(name)
        if self._cuda is None:
            work.wait()
        elif isinstance(work, self._cuda.Event):
            work.synchronize() if name == "host" else (side or self._cuda.current_stream()).wait_event(work)
        elif side is not None:
            with self._cuda.stream(side):
                work.wait()
        else:
            work.wait()
            if name == "host":
                self._cuda.current_stream().synchronize()
