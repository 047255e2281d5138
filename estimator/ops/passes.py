"""The allocations and releases of a unit's passes in their order, for a simulator of an allocator.

``PassMemory`` says what a pass's peak is; this says how it comes about. Derived by the same walk (``estimator.ops.liveness``), only
when asked for.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from estimator.ops.cost import Source
from estimator.ops.liveness import PENDING, WRITTEN, Held, Meter, play_unit
from estimator.ops.split_backward import play_weights
from estimator.ops.tape import TEMPORARIES, Tape

LOCAL_ALLOC, LOCAL_FREE, ALLOC, FREE = range(4)
"""Kinds of steps. Local ones concern what comes and goes within the pass."""

Step = tuple[int, Hashable, int]
"""Kind, which, bytes. Local: a number within the pass; else one of the names below, ``PENDING``, ``WRITTEN``, or what is the unit's own."""

INPUT, OUTPUT = "input", "output"
"""The output of a unit is the input of the next, whose backward pass ends its life."""
INPUT_GRAD, OUTPUT_GRAD = "input_grad", "output_grad"
"""The gradient of an input is the gradient of the output of the unit before, whose backward pass ends its life."""


class Far(NamedTuple):
    """A tensor, or the gradient of one, that units which are not neighbours have in common: known by its size."""

    is_grad: bool
    n_bytes: int


class UnitPasses(NamedTuple):
    """A unit's passes by the phase of its ``Compute`` events."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    input_grad: tuple[Step, ...] = ()
    weight_grad: tuple[Step, ...] = ()
    """Where backward is two passes."""

    def of(self, phase: str) -> tuple[Step, ...]:
        return self.forward if phase == "loss" else getattr(self, phase)  # type: ignore[no-any-return]


def passes_of(source: Source, *, splits: bool = False) -> UnitPasses:
    """All passes of the unit whose cost was derived from ``source``; ``splits``: backward is two passes as well."""
    forward, backward = _Recorder(), _Recorder()
    names = _Names(source.tape, play_unit(source, forward, backward))
    passes = UnitPasses(_steps(forward, names), _steps(backward, names))
    if not splits:
        return passes
    held: list[Held] = []
    now, later = _Recorder(), _Recorder()
    names = _Names(source.tape, play_unit(source, _Recorder(), now, held))
    play_weights(source.tape, held, later)
    return passes._replace(input_grad=_steps(now, names), weight_grad=_steps(later, names))


class _Recorder(Meter):
    """Writes down what comes (bytes above zero) and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Hashable, int]] = []
        self._temps: range = range(0)
        """Where the last look's temporaries come; they go right after."""

    def add(self, category: str, n_bytes: int, what: Hashable | None = None) -> None:
        if what is None or not n_bytes:
            return
        if what in (PENDING, WRITTEN) and n_bytes > 0:
            for place in reversed(self._temps):
                if self.steps[place][1] == n_bytes:  # it was made when it was a temporary, and stays
                    name = self.steps[place][0]
                    self.steps[place] = what, n_bytes
                    self.steps.remove((name, -n_bytes))
                    self._temps = range(0)
                    return
        self.steps.append((what, n_bytes))

    def look(self, *temps: int, temp_category: str = TEMPORARIES) -> None:
        start = len(self.steps)
        made = [(("temp", start, i), n) for i, n in enumerate(temps) if n]
        self.steps += made + [(name, -n) for name, n in made]
        self._temps = range(start, start + len(made))


class _Names:
    """What other passes call a unit's tensors and gradients."""

    def __init__(self, tape: Tape, left: dict[int, int]) -> None:
        self.tape = tape
        viewed = {ref for node in tape.nodes for ref in node.inputs}
        there = [ref for ref in tape.further_outputs if ref not in viewed]
        there += [shared.ref for shared in tape.shared if shared.waits]
        self._far = {*tape.further_outputs, *(shared.ref for shared in tape.shared)}
        """Tensors that units not beside this one have, too."""
        self._grads: dict[int, Hashable] = {0: OUTPUT_GRAD}
        """By number: gradients that other units have made, or are to read."""
        for number, ref in enumerate(there, start=1):
            self._grads[number] = Far(True, tape.tensors[ref].n_grad_bytes)
        for ref, number in left.items():
            self._grads[number] = INPUT_GRAD if ref == tape.input else Far(True, tape.tensors[ref].n_grad_bytes)

    def of(self, what: Hashable) -> Hashable:
        if isinstance(what, int):
            if what in self._far:
                return Far(False, self.tape.tensors[what].n_bytes)
            return INPUT if what == self.tape.input else OUTPUT if what == self.tape.output else what
        if isinstance(what, tuple) and what[0] == "grad":
            return self._grads.get(what[2], what)
        return what


def _steps(recorder: _Recorder, names: _Names) -> tuple[Step, ...]:
    """With numbers for what comes and goes within the pass."""
    steps: list[Step] = []
    open_at: dict[Hashable, int] = {}
    for what, n_bytes in _named(recorder.steps, names):
        if n_bytes > 0:
            open_at[what] = len(steps)
            steps.append((ALLOC, what, n_bytes))
        elif what in open_at:
            start = open_at.pop(what)
            assert steps[start][2] == -n_bytes
            steps[start] = LOCAL_ALLOC, start, -n_bytes
            steps.append((LOCAL_FREE, start, -n_bytes))
        else:
            steps.append((FREE, what, -n_bytes))
    return tuple(steps)


def _named(steps: Iterable[tuple[Hashable, int]], names: _Names) -> Iterable[tuple[Hashable, int]]:
    return ((names.of(what), n_bytes) for what, n_bytes in steps)
