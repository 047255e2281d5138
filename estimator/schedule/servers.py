"""Parameter servers: gradients are pushed to the ranks that step them, parameters pulled from there (Li et al. 2014).

Every rank computes; the first ``n_servers`` data ranks own an equal slice each of every group, with masters and states. A push
sends slice ``s`` of a rank's gradients to server ``s``, which adds up all ranks' in fp32 and in rank order; a pull brings every
rank the new slices. Both are messages from rank to rank: ``(ranks - 1) * n / n_servers`` bytes go through a server's link.

With a staleness of ``k`` a step waits for the pushes of ``k`` steps before, so that gradients of ``k`` steps are under way: they and
the room for what arrives live from step to step, the oldest being freed first. Tags of pushes say how many steps old they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from estimator.job.strategy import Strategy
from estimator.schedule.events import Alloc, Buffer, Collective, Event, Free, SumPieces, Tag, Wait
from estimator.schedule.messages import Hop

PUSH = "push"


class Serving(NamedTuple):
    """Of which rank of a job with parameter servers a program is."""

    n_ranks: int
    is_server: bool


def serving(strategy: Strategy, n_ranks: int, is_server: bool) -> Serving | None:
    """``None`` without servers."""
    return Serving(n_ranks, is_server) if strategy.has_servers else None


def tag(group: int, steps: int) -> Tag:
    """Names the push of ``group`` that was issued ``steps`` steps before the present one."""
    return f"{PUSH}@{steps}", group


def grow_older(newest: dict[Any, Any], staleness: int) -> None:
    """A step is over: what ``newest`` holds of pushes, by tag, is one step older."""
    for steps in reversed(range(staleness)):
        for name, group in [key for key in newest if key[0] == f"{PUSH}@{steps}"]:
            newest[tag(group, steps + 1)] = newest.pop((name, group))


def push(full_grads: Buffer, received: Buffer | None, total: Buffer | None, staleness: int, n_ranks: int) -> Hop:
    """A group's gradients leave; those of ``staleness`` steps before have arrived and, on a server, are added up into ``total``."""
    g, n_bytes = full_grads.group, full_grads.n_bytes
    issue: list[Event] = [Alloc(received)] if received is not None else []
    arrive: list[Event] = []
    if n_ranks > 1:
        issue.append(Collective("push", "grads", g, n_bytes, "reduce", tag(g, 0)))
        arrive.append(Wait("compute", tag(g, staleness)))
    if total is not None:
        arrive += [Alloc(total), SumPieces(g, total.n_bytes // 4, n_ranks)]
    arrive += [Free(received)] if received is not None else []
    return Hop(issue, [*arrive, Free(full_grads)])


def under_way(full_grads: Buffer, received: Buffer | None, staleness: int) -> list[Buffer]:
    """What pushes of earlier steps hold when a step begins."""
    return staleness * [b for b in (full_grads, received) if b is not None]
