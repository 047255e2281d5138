"""The alphabet of a ``StepProgram``: small typed events in issue order.

One program has three readers: ``estimator.memory`` adds up live bytes, ``estimator.time`` plays it on streams, and
``runtime`` obeys it. An event therefore says *what* happens and to *which group of parameters*, never how long it takes.

Streams: ``compute`` (kernels), ``gather`` and ``reduce`` (collectives), ``h2d`` and ``d2h`` (copies), ``host`` (CPU work),
``worker`` (CPU work beside it, in a thread of its own), ``nvme_read`` and ``nvme_write`` (files, in threads of their own).
An event is issued at its place in the list and runs when its stream is free; ``Wait`` makes a stream wait for the
newest event that carries a given tag. Events of one stream run in issue order. A ``Collective`` or ``Copy`` also starts
no earlier than everything issued before it on ``compute``: its buffers come from there and return there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Stream = Literal["compute", "gather", "reduce", "h2d", "d2h", "nvme_read", "nvme_write", "worker", "host"]
Place = Literal["device", "host", "nvme"]
Pass = Literal["forward", "loss", "backward"]
Purpose = Literal["params", "grads", "updated_params", "grad_norm", "states"]
CollectiveOp = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
Codec = Literal["int8", "int4", "one_bit", "adacomp"]
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


class Span(NamedTuple):
    """The data-parallel ranks that a collective joins: groups of ``size``, from each rank to the next ``stride`` further.

    ``Span(4)`` of 8 ranks: 0-3 and 4-7. ``Span(2, 4)``: 0 and 4, 1 and 5, 2 and 6, 3 and 7.
    """

    size: int
    stride: int = 1

    def ranks(self, rank: int) -> list[int]:
        """The ranks of the group that ``rank`` is in, in order."""
        first = rank - rank // self.stride % self.size * self.stride
        return [first + i * self.stride for i in range(self.size)]

    def place(self, rank: int) -> int:
        """``rank``'s own place in its group."""
        return rank // self.stride % self.size


class Collective(NamedTuple):
    """A collective over data-parallel ranks. ``n_bytes`` is the full (unsharded) tensor; of an all-to-all, all that one
    rank holds."""

    op: CollectiveOp
    purpose: Purpose
    group: int
    n_bytes: int
    stream: Stream
    tag: Tag
    span: Span | None = None
    """``None``: all of them."""
    ends: tuple[str, str] | None = None
    """Roles of the buffers that are sent and filled; ``None``: those of the purpose."""


class Pack(NamedTuple):
    """Compresses ``numel`` elements of buffer ``source`` of a group into its ``codes`` and ``scales``, on ``compute``."""

    codec: Codec
    purpose: Purpose
    group: int
    numel: int
    source: str
    error: str | None = None
    """Role of the buffer that is added before and keeps what is lost."""
    rows: int = 1
    parts: int = 1
    """The source is ``[rows, parts, ...]`` and is sent as ``[parts, rows, ...]``."""


class Unpack(NamedTuple):
    """Sums ``pieces`` messages of ``numel`` elements each, in ``received_codes`` and ``received_scales``, into ``target``."""

    codec: Codec
    purpose: Purpose
    group: int
    numel: int
    pieces: int
    target: str


class Keep(NamedTuple):
    """Copies ``n_bytes`` of freshly gathered parameters to ``secondary_params``: this rank's part of a nearer copy."""

    group: int
    n_bytes: int


class Copy(NamedTuple):
    """A copy of ``n_bytes`` between device and host on stream ``h2d`` or ``d2h``, between host and files on ``nvme_read`` or
    ``nvme_write``."""

    stream: Literal["h2d", "d2h", "nvme_read", "nvme_write"]
    purpose: Purpose
    group: int
    n_bytes: int
    tag: Tag


class Accumulate(NamedTuple):
    """Adds a freshly reduced gradient shard of ``n_bytes`` to the one kept from earlier micro-batches."""

    group: int
    n_bytes: int


class GradNorm(NamedTuple):
    """Squares and sums this rank's gradient shard of ``n_bytes``: its part of the global norm and overflow check.

    Its tag is ``("square", group)``.
    """

    group: int
    n_bytes: int
    stream: Stream


class Update(NamedTuple):
    """Optimizer step on this rank's ``numel`` elements of one group; on ``host`` when the optimizer is offloaded, on ``worker``
    when it is late as well: then of the gradients of the step before, where there was one.

    Its tag is ``("update", group)``.
    """

    group: int
    numel: int
    stream: Stream


class Wait(NamedTuple):
    """``stream`` does nothing more until the newest event with ``tag`` has finished."""

    stream: Stream
    tag: Tag


Event = Alloc | Free | Compute | Collective | Copy | Pack | Unpack | Keep | Accumulate | GradNorm | Update | Wait


class Section(NamedTuple):
    """Events that run ``repeat`` times in a row (micro-batches that are alike)."""

    name: Literal["init", "delayed_update", "micro_batch", "optimizer"]
    events: tuple[Event, ...]
    repeat: int = 1


class StepProgram(NamedTuple):
    """One training step of one rank, written down once.

    ``init`` allocates what lives from step to step; ``step`` is the sections of one step in order.
    """

    init: tuple[Event, ...]
    step: tuple[Section, ...]
