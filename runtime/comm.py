"""Collectives over a job's ranks, counted as they are issued."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from estimator.errors import InputError
from estimator.job.mesh import Mesh, Span
from estimator.schedule.events import Boundary, Collective, Event
from runtime.context import has_data

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""torch 2.13 renamed both; 2.11 has only the old names."""


_MESSAGE_TAGS: dict[str, int] = {"activations": 1, "gradients": 2, "push": 3, "pull": 4}


class Communicator:
    """Starts collectives; every call and its full (unsharded) bytes are counted from the tensors themselves.

    On NCCL parameter gathers, gradient reductions and what runs inside layers use process groups, and so streams, of their own. Over torch's fake
    group one process plays one rank of many: results are then filled from its own shard (zeros or garbage would make
    kernels run faster), so that everything but the network is real.

    Collectives take the ``span`` of ranks that they join (``None``: all); ``join`` must have made it known.
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        """``mesh``: of the ranks of torch.distributed's default group; by default all are data parallel. Raises ``InputError``
        where they are another number."""
        self.size = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.mesh = mesh or Mesh(dp=self.size)
        if self.mesh.size != self.size:
            raise InputError(
                f"the process group has {self.size} ranks; allowed: {self.mesh.size} = tp * cp * dp * pp = "
                f"{self.mesh.tp} * {self.mesh.cp} * {self.mesh.dp} * {self.mesh.pp}"
            )
        backend = dist.get_backend() if self.size > 1 else None
        self._virtual = backend == "fake"
        self._own_streams = backend == "nccl"
        self._groups: dict[tuple[str, Span | None], Any] = {("gather", None): None, ("reduce", None): None}
        self._timeout = _timeout_of_the_default_group(backend)
        if self._own_streams:
            self._groups = {key: dist.new_group(timeout=self._timeout) for key in self._groups}
        self._links: dict[tuple[str, int, int], Any] = {}
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def join(
        self, events: Iterable[Event], ends: Span | None = None, others: Iterable[tuple[str, Span]] = ()
    ) -> None:  # fmt: skip
        """Make process groups for the spans of all collectives among ``events``, and for those of ``others``, which only other
        stages of a pipeline may use. Every rank must call this, with the same spans but for ``ends``, which the first and the last
        stage of a pipeline alone use."""
        used = dict.fromkeys((*((e.stream, e.span) for e in events if isinstance(e, Collective)), *others))
        for stream, span in sorted(used, key=str):
            if span is None or span != ends:
                self.join_span(stream, span)
        if ends is not None and ends.size < self.size and ("reduce", ends) not in self._groups:
            is_end = self.mesh.place("pp", self.rank) in (0, self.mesh.pp - 1)
            self._groups["reduce", ends] = self._new_group(ends.ranks(self.rank) if is_end else [self.rank])

    def exchange(
        self, op: str, full: Tensor, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]], stream: str, *,
        counts: bool = True,
    ) -> Any:  # fmt: skip
        """Messages at once: tensors that go to ranks, and such as ranks send. What goes from one rank to another keeps its order;
        counted as ``op`` is ``full``, of which they are parts on either side."""
        if counts:
            self._count(op, full)
        if self._virtual:
            for tensor, _ in receives if has_data(full) else ():
                tensor.normal_()
            return _issued(full)
        group, tag = self._group_of(stream, None), _MESSAGE_TAGS[op]
        calls = [(dist.irecv, *received) for received in receives] + [(dist.isend, *sent) for sent in sends]
        return _Messages(dist.batch_isend_irecv([dist.P2POp(call, t, rank, group, tag) for call, t, rank in calls]))

    def join_span(self, stream: str, span: Span | None) -> None:
        """Make the process group of ``span`` for collectives that run beside those of other streams."""
        self._group_of(stream, span)

    def _group_of(self, stream: str, span: Span | None) -> Any:
        """A group that spans all ranks in order is the default group's twin; on NCCL each stream has its own."""
        whole = span is None or span.size == self.size
        if (stream, span) not in self._groups:
            known = [key for key in self._groups if key[1] == span]
            if whole and (stream, None) in self._groups:
                self._groups[stream, span] = self._groups[stream, None]
            elif not self._own_streams and (whole or known):
                self._groups[stream, span] = None if whole else self._groups[known[0]]
            else:
                assert span is not None
                self._groups[stream, span] = self._new_group(span.ranks(self.rank))
        return self._groups[stream, span]

    def _new_group(self, ranks: list[int]) -> Any:
        """Only its members make it: with thousands of ranks nobody waits for groups of others. But torch names it by how many
        groups a process has, so every rank must make as many in the same turn, if need be one of its own."""
        return dist.new_group(ranks, timeout=self._timeout, use_local_synchronization=True)

    def join_peers(self, stride: int, *, is_ring: bool) -> None:
        """On NCCL, where messages of one group run one after another, make a process group for each kind and direction of message
        between pipeline ranks, which are ``stride`` ranks apart; ``is_ring``: the last has messages for the first.

        In each turn every rank makes one, with the rank after it, with the one before it, or alone.
        """
        pp, place = self.mesh.pp, self.mesh.place("pp", self.rank)
        n_links = pp if is_ring else pp - 1
        turn_of = [2 if i == pp - 1 and pp % 2 else i % 2 for i in range(n_links)]
        """By the first rank of each link: links of one turn have no rank in common."""
        for what, turn in itertools.product(_MESSAGE_TAGS, range(3)) if self._own_streams else ():
            mine = [i for i in range(n_links) if turn_of[i] == turn and place in (i, (i + 1) % pp)]
            if not mine:
                self._new_group([self.rank])
                continue
            first, second = (self.rank + (other - place) * stride for other in (mine[0], (mine[0] + 1) % pp))
            ends = (first, second) if what == "activations" else (second, first)
            self._links[what, *ends] = self._new_group(sorted(ends))

    def send(self, tensor: Tensor, offset: int, what: Boundary) -> Any:
        """``tensor`` goes to the rank ``offset`` further."""
        self._count("send", tensor)
        if self._virtual:
            return _issued(tensor)
        to = self.rank + offset
        group = self._links.get((what, self.rank, to))
        return dist.isend(tensor, to, group=group, tag=_MESSAGE_TAGS[what])

    def recv(self, tensor: Tensor, offset: int, what: Boundary) -> Any:
        """``tensor`` becomes what the rank ``offset`` further sends."""
        if self._virtual:
            if has_data(tensor):
                tensor.normal_()
            return _issued(tensor)
        source = self.rank + offset
        group = self._links.get((what, source, self.rank))
        return dist.irecv(tensor, source, group=group, tag=_MESSAGE_TAGS[what])

    def _count(self, op: str, full: Tensor) -> None:
        self.bytes[op] += full.numel() * full.element_size()
        self.calls[op] += 1

    def place(self, span: Span | None) -> int:
        """This rank's place among those of ``span``."""
        return self.rank if span is None else span.place(self.rank)

    def all_gather(self, full: Tensor, shard: Tensor, span: Span | None = None, stream: str = "gather") -> Any:
        """``full`` becomes the shards of all ranks in rank order; ``shard`` may be its own slice of ``full``."""
        self._count("all_gather", full)
        if self._virtual and has_data(full):
            _repeat(shard, full)
            return _issued(full)
        return _all_gather(full, shard, group=self._group_of(stream, span), async_op=True)

    def gather_now(self, full: Tensor, shard: Tensor, span: Span | None = None) -> None:
        """An all-gather outside of any step: waited for, not counted."""
        if self._virtual and has_data(full):
            _repeat(shard, full)
            return
        _all_gather(full, shard, group=self._group_of("gather", span))

    @property
    def is_virtual(self) -> bool:
        """Whether one process plays one rank of many."""
        return self._virtual

    def sum_now(self, tensor: Tensor, span: Span | None = None) -> None:
        """An all-reduce outside of any step: waited for, not counted."""
        if self.size > 1 and not (self._virtual and has_data(tensor)):
            dist.all_reduce(tensor, group=None if span is None else self._group_of("reduce", span))

    def reduce_scatter(self, shard: Tensor, full: Tensor, span: Span | None = None, stream: str = "reduce") -> Any:
        """``shard`` becomes this rank's slice of the sum over ranks; it may be that slice of ``full``."""
        self._count("reduce_scatter", full)
        if self._virtual and has_data(full):
            own = full[self.place(span) * shard.numel() :][: shard.numel()]
            if shard.data_ptr() != own.data_ptr():
                shard.copy_(own)
            return _issued(full)
        return _reduce_scatter(shard, full, group=self._group_of(stream, span), async_op=True)

    def all_reduce(self, tensor: Tensor, span: Span | None = None, stream: str = "reduce") -> Any:
        """``tensor`` becomes the sum over ranks."""
        self._count("all_reduce", tensor)
        if self._virtual and has_data(tensor):
            return _issued(tensor)
        return dist.all_reduce(tensor, group=self._group_of(stream, span), async_op=True)

    def all_to_all(
        self, received: Tensor, sent: Tensor, span: Span | None = None, stream: str = "reduce",
        sizes: tuple[list[int], list[int]] | None = None,
    ) -> Any:  # fmt: skip
        """Part i of ``sent`` goes to rank i of ``span``, whose part for this rank becomes part i of ``received``.

        ``sizes``: rows of the parts of ``received`` and of ``sent``, where they are not all equal; the larger of the two tensors is
        counted then.
        """
        self._count("all_to_all", max(sent, received, key=Tensor.numel))
        if self._virtual and has_data(sent):
            part = sent.numel() // (self.size if span is None else span.size)
            own = sent.reshape(-1)
            _recycle(own if sizes is not None else own[self.place(span) * part :][:part], received)
            return _issued(sent)
        to_come, to_go = sizes or (None, None)
        group = self._group_of(stream, span)
        return dist.all_to_all_single(received, sent, to_come, to_go, group=group, async_op=True)

    def shift(
        self, received: Sequence[Tensor], sent: Sequence[Tensor], span: Span, stream: str, first_tag: int = 0
    ) -> Any:
        """Around the ring of ``span``: each of ``sent`` goes to the next rank, and ``received`` become what the one before sends.
        What is under way at once in one direction has tags of its own, from ``first_tag`` on."""
        for tensor in sent:
            self._count("send", tensor)
        if self._virtual:
            for target, source in zip(received, sent, strict=True):
                if has_data(target):
                    target.copy_(source)
            return _issued(sent[0])
        ranks, place, group = span.ranks(self.rank), span.place(self.rank), self._group_of(stream, span)
        following, before = ranks[(place + 1) % span.size], ranks[place - 1]
        messages = []
        for tag, (target, source) in enumerate(zip(received, sent, strict=True), first_tag):
            messages.append(dist.P2POp(dist.isend, source, following, group, tag))
            messages.append(dist.P2POp(dist.irecv, target, before, group, tag))
        return _Works(dist.batch_isend_irecv(messages))

    def collect(self, thing: Any, span: Span) -> list[Any]:
        """What every rank of ``span`` gives, in their order, outside of any step: waited for, not counted."""
        things: list[Any] = [None] * span.size
        dist.all_gather_object(things, thing, group=self._group_of("gather", span))
        return things

    def start_step(self) -> None:
        self.bytes.clear()
        self.calls.clear()


class _Messages:
    """Several of them, which are waited for together."""

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class _Works(NamedTuple):
    """Several that are waited for together."""

    works: list[Any]

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def _timeout_of_the_default_group(backend: str | None) -> Any:
    """How long its collectives wait: torch gives further groups a default of its own instead."""
    if backend not in ("gloo", "nccl"):
        return None
    device = torch.device("cuda" if backend == "nccl" else "cpu")
    return dist.distributed_c10d._get_default_group()._get_backend(device).options._timeout


def _repeat(shard: Tensor, full: Tensor) -> None:
    """Every slice of ``full`` becomes ``shard``, which may be one of them."""
    rows = full.view(-1, shard.numel())
    inside = shard.data_ptr() - full.data_ptr()
    own = inside // (shard.numel() * shard.element_size()) if 0 <= inside < full.numel() * full.element_size() else 0
    if rows[own].data_ptr() == shard.data_ptr():
        rows[:own].copy_(shard)
        rows[own + 1 :].copy_(shard)
    else:
        rows.copy_(shard)


def _recycle(source: Tensor, target: Tensor) -> None:
    """``target`` is filled with ``source``, one dim, as often as it takes; with zeros where that is empty."""
    flat = target.view(-1)
    if not source.numel():
        flat.zero_()
        return
    for part in flat.split(source.numel()):
        part.copy_(source[: part.numel()])


def _issued(tensor: Tensor) -> Any:
    """What to wait for after work on the current stream; ``None`` on the CPU, where it is done."""
    if not tensor.is_cuda:
        return None
    event = torch.cuda.Event()
    event.record()
    return event
