"""The alphabet of a ``StepProgram``: small typed events in issue order.

One program has three readers: ``estimator.memory`` adds up live bytes, ``estimator.time`` plays it on streams, and
``runtime`` obeys it. An event therefore says *what* happens and to *which group of parameters*, never how long it takes.

Streams: ``compute`` (kernels), ``gather`` and ``reduce`` (collectives), ``h2d`` and ``d2h`` (copies), ``send`` and ``recv`` (between pipeline ranks), ``host`` (CPU work),
``worker`` (CPU work beside it, in a thread of its own), ``nvme_read`` and ``nvme_write`` (files, in threads of their own).
An event is issued at its place in the list and runs when its stream is free; ``Wait`` makes a stream wait for the
newest event that carries a given tag. Events of one stream run in issue order. A ``Collective`` or ``Copy`` also starts
no earlier than everything issued before it on ``compute``: its buffers come from there and return there.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from estimator.job.mesh import Span

Stream = Literal[
    "compute", "gather", "reduce", "h2d", "d2h", "send", "recv", "nvme_read", "nvme_write", "worker", "host"
]
Place = Literal["device", "host", "nvme"]
Pass = Literal["forward", "loss", "recompute", "backward", "input_grad", "weight_grad"]
"""``recompute``: where a unit's layers are units of their own, what of each runs again before their backward passes."""
PHASE_OF_PASS: dict[str, str] = {
    "forward": "forward", "loss": "loss", "recompute": "backward", "backward": "backward", "input_grad": "backward",
    "weight_grad": "backward",
}  # fmt: skip
"""As what a pass counts."""
Purpose = Literal["params", "grads", "updated_params", "grad_norm", "states", "activations"]
CollectiveOp = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "push", "pull"]
"""``push`` and ``pull``: to and from parameter servers."""
Codec = Literal["int8", "int4", "one_bit", "adacomp"]
Boundary = Literal["activations", "gradients"]
"""What passes from pipeline rank to pipeline rank: forward, and backward. Messages of one kind from one rank to another keep
their order: the n-th ``Recv`` takes the n-th ``Send``."""
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
    """A collective. ``n_bytes`` is the full (unsharded) tensor; of an all-to-all, all that one
    rank holds."""

    op: CollectiveOp
    purpose: Purpose
    group: int
    n_bytes: int
    stream: Stream
    tag: Tag
    span: Span | None = None
    """``None``: all ranks of the job."""
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


class PickRows(NamedTuple):
    """Puts those rows of a group's table of gradients that are not zero, ``n_rows`` at most, into its ``rows``, and their numbers
    (int64) into its ``ids``, on ``compute``."""

    purpose: Purpose
    group: int
    n_rows: int
    table: tuple[int, int]
    """Rows and columns of all of it."""
    width: int
    """Bytes of an element."""


class AddRows(NamedTuple):
    """A group's table of gradients becomes the sum of ``pieces`` messages, in ``received_ids`` and ``received_rows``."""

    group: int
    n_rows: int
    table: tuple[int, int]
    pieces: int
    width: int


class SumPieces(NamedTuple):
    """Adds up, in rank order and in fp32, the ``numel`` gradients of each of ``pieces`` ranks that the oldest push of a group has
    brought to this server, its own among them, into ``server_sum``."""

    group: int
    numel: int
    pieces: int


class Keep(NamedTuple):
    """Copies ``n_bytes`` of freshly gathered parameters to ``secondary_params``: this rank's part of a nearer copy."""

    group: int
    n_bytes: int


class Restage(NamedTuple):
    """Casts or copies a group's parameters or gradients between what is sent and what the model has: ``n_bytes`` read and written."""

    purpose: Purpose
    group: int
    n_bytes: int
    stream: Stream


class Copy(NamedTuple):
    """A copy of ``n_bytes`` between device and host on stream ``h2d`` or ``d2h``, between host and files on ``nvme_read`` or
    ``nvme_write``."""

    stream: Literal["h2d", "d2h", "nvme_read", "nvme_write"]
    purpose: Purpose
    group: int
    n_bytes: int
    tag: Tag


class Blend(NamedTuple):
    """Adds the optimizer's first moment, times ``beta1 / (1 - beta1)``, to this rank's own ``numel`` gradients: that is its next
    momentum over ``1 - beta1`` (1-bit Adam, Tang et al. 2021, algorithm 1, line 6)."""

    group: int
    numel: int


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
    copies: int = 1
    """Ranks among which the norm is summed that hold the same gradients: each counts its share."""


class Update(NamedTuple):
    """Optimizer step on this rank's ``numel`` elements of one group; on ``host`` when the optimizer is offloaded, on ``worker``
    when it is late as well: then of the gradients of the step before, where there was one.

    Its tag is ``("update", group)``.
    """

    group: int
    numel: int
    stream: Stream


class Commit(NamedTuple):
    """Makes what has been written to files since the last one their newest version: the host waits for the disk."""


class Wait(NamedTuple):
    """``stream`` does nothing more until the newest event with ``tag`` has finished."""

    stream: Stream
    tag: Tag


class Send(NamedTuple):
    """What the pass before made goes to the pipeline rank ``offset`` ranks further, on stream ``send``: a chunk's output, or
    the gradient of its input. It lives until ``Sent``."""

    what: Boundary
    n_bytes: int
    offset: int
    tag: Tag


class Sent(NamedTuple):
    """Drops the ``n_bytes`` that the newest ``Send`` of ``what`` has sent."""

    what: Boundary
    n_bytes: int


class Recv(NamedTuple):
    """Makes room for ``n_bytes`` and lets the pipeline rank ``offset`` ranks further fill it, on stream ``recv``: with the
    input of the next chunk to go forward, or the gradient of the output of the next to go backward. Those passes end its life."""

    what: Boundary
    n_bytes: int
    offset: int
    tag: Tag


BOUNDARY_CATEGORY: dict[str, str] = {"activations": "activations", "gradients": "temporaries"}
"""As what a message counts."""

Event = (
    Send
    | Sent
    | Recv
    | Alloc
    | Free
    | Compute
    | Collective
    | Copy
    | Restage
    | Pack
    | Unpack
    | PickRows
    | AddRows
    | SumPieces
    | Keep
    | Blend
    | Accumulate
    | GradNorm
    | Update
    | Commit
    | Wait
)


class Section(NamedTuple):
    """Events that run ``repeat`` times in a row (micro-batches that are alike)."""

    name: Literal["init", "delayed_update", "micro_batch", "optimizer"]
    events: tuple[Event, ...]
    repeat: int = 1
    passes: tuple[tuple[Event, ...], ...] = ()
    """Of a pipeline's section: its events once more, cut where a pass over a chunk begins. Equal passes are one object."""


class StepProgram(NamedTuple):
    """One training step of one rank, written down once.

    ``init`` allocates what lives from step to step; ``step`` is the sections of one step in order.
    """

    init: tuple[Event, ...]
    step: tuple[Section, ...]
