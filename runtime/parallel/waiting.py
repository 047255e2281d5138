"""Waiting for other ranks within a pass, as a part of the step's seconds."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from runtime.context import managed_memory
from runtime.parts import PartClock


class Waiting:
    """What ranks share within layers."""

    parts: PartClock | None = None
    """Told of every wait for other ranks, if set."""

    def wait(self, work: Any) -> None:
        """Until what ``work`` stands for is done; ``None``: it is."""
        with self.parts.part("exposed_other_comm") if self.parts is not None else nullcontext(), managed_memory():
            if work is not None:
                work.wait()
