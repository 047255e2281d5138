"""The program's side streams: real CUDA streams on a GPU, nothing at all elsewhere."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class SideStreams:
    """``gather``, ``reduce``, ``h2d`` and ``d2h`` beside the compute stream.

    On the CPU (and on ``meta``) copies are done when ``copy`` returns and collectives run in gloo's own threads.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        names = ("gather", "reduce", "h2d", "d2h") if self.cuda else ()
        self._streams = {name: torch.cuda.Stream(device) for name in names}

    def on(self, name: str) -> AbstractContextManager[Any]:
        """Issue on side stream ``name``, after everything issued so far on the compute stream."""
        if not self.cuda:
            return nullcontext()
        side = self._streams[name]
        side.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(side)

    def copy(self, name: str, source: Tensor, target: Tensor) -> Any:
        """Copy ``source`` to ``target`` (same size and dtype); returns a handle to wait for."""
        with self.on(name):
            target.copy_(source, non_blocking=True)
            if not self.cuda:
                return None
            done = torch.cuda.Event()
            done.record()
            return done

    def wait(self, name: str, work: Any) -> None:
        """Make stream ``name`` (``compute``: the current one, ``host``: this thread) wait for ``work``.

        ``work`` is a copy's handle or a collective in flight; ``None`` is done already.
        """
        if work is None:
            return
        side = self._streams.get(name)
        if isinstance(work, torch.cuda.Event):
            work.synchronize() if name == "host" else (side or torch.cuda.current_stream()).wait_event(work)
        elif side is not None:
            with torch.cuda.stream(side):
                work.wait()
        else:
            work.wait()
            if self.cuda and name == "host":
                torch.cuda.current_stream().synchronize()
