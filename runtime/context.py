"""The ledger that is metering this process, if any; models tag their logits through it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from runtime.ledger import Ledger

_ledger: Ledger | None = None


@contextmanager
def metered_by(ledger: Ledger) -> Iterator[None]:
    """Inside, ``ledger`` sees every allocation."""
    global _ledger
    before, _ledger = _ledger, ledger
    try:
        with ledger:
            yield
    finally:
        _ledger = before


def current_ledger() -> Ledger | None:
    return _ledger


def logits_memory() -> AbstractContextManager[None]:
    """Allocations inside are counted as ``logits_loss``."""
    return _ledger.category("logits_loss") if _ledger is not None else nullcontext()


def last_of_logits(tensor: Tensor) -> None:
    """``tensor``, though of the loss, is no logits: what is made of it is not counted as such."""
    if _ledger is not None:
        _ledger.last_of_logits(tensor)


def input_memory() -> AbstractContextManager[None]:
    """Allocations inside are a batch: counted with the activations that hold it."""
    return _ledger.category("activations") if _ledger is not None else nullcontext()


def managed_memory() -> AbstractContextManager[None]:
    """Allocations inside are not counted: they are scratch of the set-up or reported by ``Ledger.hold``."""
    return _ledger.blind() if _ledger is not None else nullcontext()


def has_data(tensor: Tensor) -> bool:
    """Whether ``tensor`` holds numbers, and not only a shape."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
