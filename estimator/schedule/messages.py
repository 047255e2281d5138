"""What compressed collectives carry: codes, and a scale for each block of them, in buffers of their own.

Bytes of one message of ``numel`` elements: int8 ``n + 4 n / 256``, int4 ``n / 2 + 4 n / 256`` (ZeRO++, Wang et al. 2023,
section 3), signs ``n / 8 + 4 n / 1024`` (1-bit Adam, Tang et al. 2021, section 4); shards are whole blocks there. AdaComp
(Chen et al. 2018) in messages of fixed size: ``2 n / 8 + 4 n / 512 + 4``, 16 bits for each element sent.
"""

from __future__ import annotations

from typing import NamedTuple

from estimator.job.mesh import Span
from estimator.ops.kernels import one_bit, quantize
from estimator.schedule.events import (
    AddRows,
    Alloc,
    Buffer,
    Codec,
    Collective,
    CollectiveOp,
    Event,
    Free,
    Pack,
    PickRows,
    Stream,
    Unpack,
    Wait,
)
from estimator.sharding.layout import ADACOMP_BIN, ADACOMP_SHARE, BLOCK_NUMEL


class Hop(NamedTuple):
    """One exchange between ranks: what starts it, and what makes its result usable."""

    issue: list[Event]
    arrive: list[Event]


def message_bytes(codec: Codec, numel: int) -> dict[str, int]:
    """Bytes of each part of a message of ``numel`` elements: ``codes`` and ``scales``; AdaComp's ``counts`` too."""
    if codec == "adacomp":
        return {"codes": 2 * (numel // ADACOMP_SHARE), "counts": 4 * -(-numel // ADACOMP_BIN), "scales": 4}
    block = BLOCK_NUMEL[codec]
    assert numel % block == 0, f"{numel} elements are not whole blocks of {block}"
    codes = one_bit.sign_bytes(numel) if codec == "one_bit" else quantize.code_bytes(numel, codec)
    return {"codes": codes, "scales": 4 * numel // block}


def _parts(pack: Pack | PickRows) -> dict[str, int]:
    if isinstance(pack, Pack):
        return message_bytes(pack.codec, pack.numel)
    return {"ids": 8 * pack.n_rows, "rows": pack.n_rows * pack.table[1] * pack.width}


class Exchange(NamedTuple):
    """A compressed collective: ``pack`` before, ``unpack`` after, codes and scales one after the other between."""

    op: CollectiveOp
    """``all_gather``: every rank's message goes to all; ``all_to_all``: part i of it to rank i."""
    pack: Pack | PickRows
    unpack: Unpack | AddRows
    stream: Stream
    tag: str
    """Verb of the tags."""
    span: Span
    category: str
    """Of the messages."""
    source: Buffer | None = None
    """Dropped when the message is packed."""
    target: Buffer | None = None
    """Made when the message has arrived."""
    adder: Buffer | None = None
    """Lives while the message is unpacked."""

    def hop(self) -> Hop:
        g = self.pack.group
        copies = self.span.size if self.op == "all_gather" else 1
        calls: list[Event] = []
        waits: list[Event] = []
        received: list[Buffer] = []
        sent = [Buffer(part, g, self.category, n_bytes) for part, n_bytes in _parts(self.pack).items()]
        for buffer in sent:
            came = Buffer(f"received_{buffer.role}", g, self.category, copies * buffer.n_bytes)
            tag = (f"{self.tag}_{buffer.role}", g)
            ends = (buffer.role, came.role)
            calls += [
                Alloc(came),
                Collective(self.op, self.pack.purpose, g, came.n_bytes, self.stream, tag, self.span, ends),
            ]
            waits.append(Wait("compute", tag))
            received.append(came)
        # codes are made in the source's order, then put into that of the ranks they go to
        scratch = [
            b._replace(role=f"unordered_{b.role}") for b in sent if isinstance(self.pack, Pack) and self.pack.rows > 1
        ]
        packing: list[Event] = [*map(Alloc, [*sent, *scratch]), self.pack, *map(Free, scratch)]
        dropped = [Free(self.source)] if self.source else []
        made = [Alloc(self.target)] if self.target else []
        adder = [self.adder] if self.adder else []
        arrive: list[Event] = [
            *waits, *map(Free, sent), *made, *map(Alloc, adder), self.unpack, *map(Free, [*adder, *received])
        ]  # fmt: skip
        return Hop([*packing, *dropped, *calls], arrive)


def secondary_gather(full: Buffer, secondary: Buffer, span: Span) -> Hop:
    """hpZ of ZeRO++: parameters are gathered from the copy that ``span`` shares."""
    g = full.group
    ends = (secondary.role, full.role)
    gather = Collective("all_gather", "params", g, full.n_bytes, "gather", ("gather", g), span, ends)
    return Hop([Alloc(full), gather], [Wait("compute", ("gather", g))])


def quantized_gather(g: int, shard_numel: int, full: Buffer, span: Span) -> Hop:
    """qwZ of ZeRO++: parameters are gathered as int8; ``full`` is made when they have arrived."""
    return Exchange(
        op="all_gather",
        pack=Pack("int8", "params", g, shard_numel, "kept_params"),
        unpack=Unpack("int8", "params", g, shard_numel * span.size, 1, "full_params"),
        stream="gather",
        tag="gather",
        span=span,
        category="gathered_params",
        target=full,
    ).hop()
