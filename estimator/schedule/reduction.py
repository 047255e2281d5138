"""How gradients are summed over ranks: exactly, as int4 in two hops, or with error feedback as signs or AdaComp messages."""

from __future__ import annotations

from dataclasses import replace

from estimator.job.mesh import Span
from estimator.job.strategy import GradCompression, Strategy
from estimator.schedule.buffers import GroupBuffers
from estimator.schedule.events import AddRows, Blend, Buffer, Collective, Event, Pack, PickRows, Unpack, Wait
from estimator.schedule.messages import Exchange, Hop
from estimator.sharding.layout import Group
from estimator.sharding.units import Param


def exact(b: GroupBuffers, stage: int, shards: Span | None) -> Hop:
    """One collective, in the dtype of the gradients."""
    g, n_bytes = b.full_grads.group, b.full_grads.n_bytes
    op = "reduce_scatter" if stage >= 1 else "all_reduce"
    tag = ("reduce", g)
    return Hop([Collective(op, "grads", g, n_bytes, "reduce", tag, shards)], [Wait("compute", tag)])  # type: ignore[arg-type]


def sum_again(b: GroupBuffers, shard_bytes: int, spans: list[Span]) -> Hop:
    """The sum of a reduced shard over further ranks, one span after another: over the groups that each hold a copy (MiCS,
    Zhang et al. 2022, section 3.4), over tensor-parallel ranks that each have seen a part of the sequence."""
    g = b.full_grads.group
    tag = ("cross", g)
    issue: list[Event] = []
    for span in spans:
        issue += [Wait("reduce", tag)] if issue else []
        issue.append(Collective("all_reduce", "grads", g, shard_bytes, "reduce", tag, span))
    return Hop(issue, [Wait("compute", tag)])


def compressed(
    group: Group, b: GroupBuffers, strategy: Strategy, stage: int, n_ranks: int, first: bool
) -> tuple[Hop, ...]:
    """The hops of a compressed sum over ``n_ranks`` data ranks, which are neighbours; ``first``: of a step's first micro-batch."""
    if strategy.grad_compression == "one_bit":
        hops = signs(group, b, stage, n_ranks)
        return momentum(group, hops) if strategy.compresses_momentum else hops
    if strategy.grad_compression == "adacomp":
        return chosen(group, b, n_ranks)
    return int4(group, b, first, Span(strategy.quantized_grads), n_ranks)


def int4(group: Group, b: GroupBuffers, first: bool, near: Span, n_ranks: int) -> tuple[Hop, ...]:
    """qgZ (Wang et al. 2023, section 3.3): an all-to-all inside groups, sums, and an all-to-all across them.

    Each rank sends ``n - n / near`` and then ``n / near - n / ranks`` elements of int4 instead of ``n - n / ranks`` of
    ``dtype``. In the first hop a rank gives each neighbour the shards of all ranks that have that neighbour's place.
    """
    g = group.number
    shard = b.grad_shard if first else b.reduced
    assert shard is not None
    places = n_ranks // near.size
    part_numel = places * group.shard_numel
    last = places == 1
    partial_bytes = b.full_grads.n_bytes // near.size
    target = shard if last else Buffer("partial_grads", g, "reduce_buckets", partial_bytes)
    inside = Exchange(
        op="all_to_all",
        pack=Pack("int4", "grads", g, group.padded_numel, "full_grads", rows=places, parts=near.size),
        unpack=Unpack("int4", "grads", g, part_numel, near.size, target.role),
        stream="reduce",
        tag="reduce",
        span=near,
        category="reduce_buckets",
        source=b.full_grads,
        target=target,
    ).hop()
    if last:
        return (inside,)
    across = Exchange(
        op="all_to_all",
        pack=Pack("int4", "grads", g, part_numel, target.role),
        unpack=Unpack("int4", "grads", g, group.shard_numel, places, shard.role),
        stream="reduce",
        tag="cross",
        span=Span(places, near.size),
        category="reduce_buckets",
        source=target,
        target=shard,
    ).hop()
    return inside, across


def signs(group: Group, b: GroupBuffers, stage: int, n_ranks: int) -> tuple[Hop, ...]:
    """Signs with error feedback: every rank serves the sum of one part (Tang et al. 2021, section 4: compressed all-reduce).

    ``2 n (ranks - 1) / ranks`` elements leave each rank, each an eighth of a byte and its share of a scale; under stage 1
    the served part is the shard and half of that.
    """
    g, n = group.number, group.padded_numel
    part_numel = n // n_ranks
    everyone = Span(n_ranks)
    served = Buffer("partial_sum", g, "reduce_buckets", 4 * part_numel) if stage == 0 else None
    to_servers = Exchange(
        op="all_to_all",
        pack=Pack("one_bit", "grads", g, n, "full_grads", error="error"),
        unpack=Unpack("one_bit", "grads", g, part_numel, n_ranks, "own_grads" if served is None else served.role),
        stream="reduce",
        tag="reduce",
        span=everyone,
        category="reduce_buckets",
        target=served,
    ).hop()
    if served is None:
        return (to_servers,)
    to_all = Exchange(
        op="all_gather",
        pack=Pack("one_bit", "grads", g, part_numel, served.role, error="server_error"),
        unpack=Unpack("one_bit", "grads", g, n, 1, "full_grads"),
        stream="reduce",
        tag="cross",
        span=everyone,
        category="reduce_buckets",
        source=served,
    ).hop()
    return to_servers, to_all


def momentum(group: Group, hops: tuple[Hop, ...]) -> tuple[Hop, ...]:
    """``hops`` of momentum instead of gradients."""
    blend = Blend(group.number, group.padded_numel)
    return (hops[0]._replace(issue=[blend, *hops[0].issue]), *hops[1:])


def warm_up(strategy: Strategy) -> Strategy | None:
    """What runs in the steps before compression begins; ``None``: there are none."""
    if not strategy.compression_warmup_steps:
        return None
    return replace(strategy, grad_compression="none", compression_warmup_steps=0)


def chosen(group: Group, b: GroupBuffers, n_ranks: int) -> tuple[Hop, ...]:
    """AdaComp (Chen et al. 2018, algorithm 2): every rank sends the elements that it chose to all, who add them up in fp32."""
    g, n = group.number, group.padded_numel
    is_fp32 = b.full_grads.n_bytes == 4 * n
    everybody = Exchange(
        op="all_gather",
        pack=Pack("adacomp", "grads", g, n, "full_grads", error="error"),
        unpack=Unpack("adacomp", "grads", g, n, n_ranks, "full_grads"),
        stream="reduce",
        tag="reduce",
        span=Span(n_ranks),
        category="reduce_buckets",
        adder=None if is_fp32 else Buffer("partial_sum", g, "reduce_buckets", 4 * n),
    )
    return (everybody.hop(),)


def touched_rows(group: Group, b: GroupBuffers, table: Param, n_micro_batches: int, n_ranks: int) -> Hop:
    """Every rank sends the rows that its tokens of the step have used to all, who add them up: ``ranks * (8 + row)`` bytes for
    each of ``n_micro_batches * table.rows`` rows, or of all."""
    shape = (table.shape[0], table.shape[1])
    n_rows = min(shape[0], n_micro_batches * table.rows)
    width = b.full_grads.n_bytes // group.padded_numel
    return Exchange(
        op="all_gather",
        pack=PickRows("grads", group.number, n_rows, shape, width),
        unpack=AddRows(group.number, n_rows, shape, n_ranks, width),
        stream="reduce",
        tag="reduce",
        span=Span(n_ranks),
        category="reduce_buckets",
    ).hop()


def errors(group: Group, compression: GradCompression, stage: int, n_ranks: int) -> tuple[Buffer, ...]:
    """What is kept from step to step, in fp32: what was lost of this rank's gradients, and of the sums that it serves."""
    error = Buffer("error", group.number, "reduce_buckets", 4 * group.padded_numel)
    server = Buffer("server_error", group.number, "reduce_buckets", 4 * group.padded_numel // n_ranks)
    return (error, server) if stage == 0 and compression == "one_bit" else (error,)
