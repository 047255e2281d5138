"""``Prepared``: one task ready to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Skip(Exception):
    """This point cannot be measured here; the text says why."""


class Prepared(NamedTuple):
    """A call with its operands."""

    call: Callable[[], Any]
    work: float
    """FLOPs, bytes, elements or operators of one call."""
    on_host: bool = False
    """Timed by the host's clock, even on a GPU."""
    before: Callable[[], Any] | None = None
    """Runs ahead of every repeat and is not timed."""
    after: Callable[[], Any] | None = None
    """Runs once when the task is over: puts back what preparing it changed."""
    less_s: float = 0.0
    """Seconds of the call that are not the work's: of starting autograd, say."""
