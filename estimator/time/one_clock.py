"""Collectives and arithmetic that share a CPU's cores."""

from __future__ import annotations


def sharing(overlap: float) -> tuple[float, float]:
    """What a second of collective costs arithmetic beside it, where together they take ``1 - overlap`` seconds more than arithmetic
    alone; and the share of it for which nothing else goes on. Cores that both want are shared evenly, so that arithmetic is
    never slower than by half: what costs more stops it."""
    cost = 1.0 - overlap
    return min(cost, 0.5), max(0.0, 2.0 * cost - 1.0)


def slowed_by(ahead_s: float, seconds: float, slowing: float) -> float:
    """By how much ``seconds`` of arithmetic take longer beside collectives that go on for ``ahead_s``, each second of which costs it
    ``slowing``."""
    return slowing * min(ahead_s, seconds / (1.0 - slowing))
