"""Outputs that nobody keeps: whoever saved one for its backward pass gets it made again.

Inside ``with remaker:`` the operators of ``runtime.functional`` that are ``remakable`` and belong to one of its parts note how
their output was made. Where autograd would save such an output it saves that note instead; the first backward node that needs
the output has it made again, the last one drops it. What it is made from the operator's own backward pass keeps in any case.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

F = TypeVar("F", bound=Callable[..., Tensor])

_current: Remaker | None = None


class _Note:
    """How an output was made, and the output itself while backward nodes still need it."""

    def __init__(self, make: Callable[[], Tensor], n_bytes: int, replay: Callable[[], Any]) -> None:
        self.n_saved = 0
        self._make, self._n_bytes, self._replay = make, n_bytes, replay
        self._output: Tensor | None = None

    def output(self) -> Tensor:
        if self._output is None:
            with self._replay(), torch.no_grad():
                self._output = self._make()
            assert self._output.untyped_storage().nbytes() == self._n_bytes
        output = self._output
        self.n_saved -= 1
        if self.n_saved == 0:
            self._output = None
        return output


class Remaker:
    """What one block notes in a forward pass. ``replay``: a context in which outputs are made again."""

    def __init__(self, parts: frozenset[str], replay: Callable[[], Any]) -> None:
        self.parts, self._replay = parts, replay
        self._notes: dict[int, tuple[_Note, weakref.ref]] = {}
        self._hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> Remaker:
        global _current
        assert _current is None, "blocks do not contain one another"
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        assert self._hooks is not None
        self._hooks.__exit__()
        self._notes.clear()

    def note(self, output: Tensor, make: Callable[[], Tensor]) -> None:
        """``make()`` gives ``output`` again."""
        storage = output.untyped_storage()
        key = storage._cdata
        gone = weakref.ref(storage, lambda _: self._notes.pop(key, None))
        self._notes[key] = (_Note(make, storage.nbytes(), self._replay), gone)

    def _pack(self, tensor: Tensor) -> Any:
        known = self._notes.get(tensor.untyped_storage()._cdata)
        if known is None:
            return tensor
        known[0].n_saved += 1
        return known[0], tensor.size(), tensor.stride(), tensor.storage_offset()


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    note, size, stride, offset = packed
    return note.output().as_strided(size, stride, offset)


@contextmanager
def suspended() -> Iterator[None]:
    """Inside, nothing is noted: a checkpoint makes all of it again."""
    global _current
    before, _current = _current, None
    try:
        yield
    finally:
        _current = before


def note(part: str, output: Tensor, operator: Callable[..., Tensor], *args: Any) -> None:
    """``output``, of ``part``, is what ``operator(*args)`` gives."""
    if _current is not None and part in _current.parts and output.requires_grad:
        _current.note(output, partial(operator, *map(_apart, args)))


def remakable(part: str, operator: F) -> F:
    """``operator``, whose output belongs to ``part`` and can be made again from what its backward pass keeps."""

    @wraps(operator)
    def noted(*args: Any) -> Tensor:
        output = operator(*args)
        note(part, output, operator, *args)
        return output

    return noted  # type: ignore[return-value]


def _apart(x: Any) -> Any:
    """``x`` without its history; parameters stay as they are, since their memory comes and goes."""
    return x.detach() if isinstance(x, Tensor) and not isinstance(x, nn.Parameter) else x
