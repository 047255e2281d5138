"""The alphabet of a ``StepProgram``: small typed events in issue order.

One program has three readers: ``estimator.memory`` adds up live bytes, ``estimator.time`` plays it on streams, and
``runtime`` obeys it. An event therefore says *what* happens and to *which group of parameters*, never how long it takes.

Streams: ``compute`` (kernels), ``gather`` and ``reduce`` (collectives), ``h2d`` and ``d2h`` (copies), ``host`` (CPU work).
An event is issued at its place in the list and runs when its stream is free; ``Wait`` makes a stream wait for the
newest event that carries a given tag. Events of one stream run in issue order. A ``Collective`` or ``Copy`` also starts
no earlier than everything issued before it on ``compute``: its buffers come from there and return there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Stream = Literal["compute", "gather", "reduce", "h2d", "d2h", "host"]
Place = Literal["device", "host"]
Pass = Literal["forward", "loss", "backward"]
Purpose = Literal["params", "grads", "updated_params", "grad_norm"]
Tag = tuple[str, int]
"""What a ``Wait`` names: (verb, group index), e.g. ``("gather", 3)``."""


class Buffer(NamedTuple):
    """Memory that the runtime itself owns (anything but what operators allocate)."""

    role: str
    """Name of the buffer in the runtime, e.g. ``"full_params"``, ``"grad_shard"``."""
    group: int
    category: str
    """One of ``estimator.report.CATEGORIES``."""
    n_bytes: int
    place: Place = "device"


class Alloc(NamedTuple):
    buffer: Buffer


class Free(NamedTuple):
    buffer: Buffer


class Compute(NamedTuple):
    """Forward, loss or backward of one unit (index into the layout's units) on the compute stream."""

    unit: int
    phase: Pass


class Collective(NamedTuple):
    """A collective over the data-parallel group. ``n_bytes`` is the full (unsharded) tensor."""

    op: Literal["all_gather", "reduce_scatter", "all_reduce"]
    purpose: Purpose
    group: int
    n_bytes: int
    stream: Stream
    tag: Tag


class Copy(NamedTuple):
    """A copy between device and host of ``n_bytes`` on stream ``h2d`` or ``d2h``."""

    stream: Literal["h2d", "d2h"]
    purpose: Purpose
    group: int
    n_bytes: int
    tag: Tag


class Accumulate(NamedTuple):
    """Adds a freshly reduced gradient shard of ``n_bytes`` to the one kept from earlier micro-batches."""

    group: int
    n_bytes: int


class GradNorm(NamedTuple):
    """Squares and sums this rank's gradient shard of ``n_bytes``: its part of the global norm and overflow check."""

    group: int
    n_bytes: int
    stream: Stream


class Update(NamedTuple):
    """Optimizer step on this rank's ``numel`` elements of one group; on ``host`` when the optimizer is offloaded.

    Its tag is ``("update", group)``.
    """

    group: int
    numel: int
    stream: Stream


class Wait(NamedTuple):
    """``stream`` does nothing more until the newest event with ``tag`` has finished."""

    stream: Stream
    tag: Tag


Event = Alloc | Free | Compute | Collective | Copy | Accumulate | GradNorm | Update | Wait


class Section(NamedTuple):
    """Events that run ``repeat`` times in a row (micro-batches that are alike)."""

    name: Literal["init", "micro_batch", "optimizer"]
    events: tuple[Event, ...]
    repeat: int = 1


class StepProgram(NamedTuple):
    """One training step of one rank, written down once.

    ``init`` allocates what lives from step to step; ``step`` is the sections of one step in order.
    """

    init: tuple[Event, ...]
    step: tuple[Section, ...]
