"""Exact rank tests of two samples and of pairs, with the estimate and the interval that belong to them.

Two samples: Mann and Whitney (Annals of Mathematical Statistics 18, 1947). Pairs: Wilcoxon's signed ranks (Biometrics Bulletin
1, 1945). The estimates are those of Hodges and Lehmann (Annals of Mathematical Statistics 34, 1963): the median of all
pairwise differences, and of all averages of two differences; the intervals are what the test does not reject (D. F. Bauer,
JASA 67, 1972). No random numbers: equal values give equal answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ALPHA = 0.01
"""Largest probability of a false alarm of one metric in one direction that the test admits (before the minimum effect)."""
ALPHA_PASS = 0.05
"""Largest probability with which a loss of exactly the minimum effect may pass."""
GOOD_RUNS = 5
"""Runs on each side with which the rank test can reach ``ALPHA`` with one pair of runs in the wrong order: P(U <= 1) = 2/252."""
GOOD_PAIRS = 8
"""Pairs with which the signed-rank test can reach ``ALPHA`` with the smallest difference on the wrong side: P(W <= 1) = 2/256."""
MOST_RUNS = 30
"""More than this is never asked for."""


@dataclass(frozen=True, kw_only=True)
class Shift:
    """By how much new values lie above old ones."""

    estimate: float
    low: float | None
    """Bounds that the test at its level on each side does not reject; ``None``: too few values for any bound."""
    high: float | None


def shift_of(base: Sequence[float], new: Sequence[float], alpha: float = ALPHA) -> Shift:
    """Estimate and interval for two samples; each bound is wrong with a probability of at most ``alpha`` (exact for
    exchangeable, untied values, whatever their distribution).
    """
    differences = np.subtract.outer(np.asarray(new, float), np.asarray(base, float)).ravel()
    return _shift(differences, critical_rank(len(new), len(base), alpha))


def shift_of_pairs(differences: Sequence[float], alpha: float = ALPHA) -> Shift:
    """Estimate and interval for differences of pairs (new less old); exact for differences that are symmetric about
    the shift, which they are when the two of a pair were measured in an order that is turned from pair to pair.
    """
    d = np.asarray(differences, float)
    i, j = np.triu_indices(len(d))
    return _shift((d[i] + d[j]) / 2, critical_signed_rank(len(d), alpha))


def _shift(values: np.ndarray, k: int) -> Shift:
    """Median of ``values`` (1-D) and their ``k``-th value from either end."""
    ordered = np.sort(values)
    ends = (float(ordered[k - 1]), float(ordered[-k])) if k else (None, None)
    return Shift(estimate=float(np.median(ordered)), low=ends[0], high=ends[1])


@lru_cache(maxsize=4096)
def critical_rank(n: int, m: int, alpha: float = ALPHA) -> int:
    """Largest k with P(U <= k - 1) <= ``alpha`` for Mann and Whitney's U of ``n`` against ``m`` values; 0: none.

    The counts of U are the coefficients of the Gaussian binomial coefficient, in whole numbers.
    """
    counts = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):  # times (1 - q^(m+i))
            counts[u] -= counts[u - m - i]
        for u in range(i, n * m + 1):  # divided by (1 - q^i)
            counts[u] += counts[u - i]
    return _critical(counts, alpha * math.comb(n + m, n))


@lru_cache(maxsize=4096)
def critical_signed_rank(n: int, alpha: float = ALPHA) -> int:
    """Largest k with P(W <= k - 1) <= ``alpha`` for Wilcoxon's W of ``n`` differences; 0: none.

    W is a sum over a subset of 1..n, each subset as likely as any other.
    """
    total = n * (n + 1) // 2
    counts = [1] + [0] * total
    for i in range(1, n + 1):
        for w in range(total, i - 1, -1):
            counts[w] += counts[w - i]
    return _critical(counts, alpha * 2**n)


def _critical(counts: Sequence[int], most: float) -> int:
    """How many of the smallest outcomes, of which there are ``counts``, add up to at most ``most``."""
    below = k = 0
    while k < len(counts) and below + counts[k] <= most:
        below += counts[k]
        k += 1
    return min(k, len(counts) // 2)


def runs_needed(half_width: float | None, room: float, n: int, m: int) -> tuple[int, int]:
    """(new runs, baseline runs) to add until the interval is probably narrower than ``room``: its half-width shrinks like
    the square root of 1/n + 1/m. A baseline grows only when new runs alone cannot do it.
    """
    for baseline in range(max(m, GOOD_RUNS), MOST_RUNS + 1):
        for new in range(max(n, 1), MOST_RUNS + 1):
            if (new, baseline) == (n, m) or ALPHA * math.comb(new + baseline, new) < 1:  # no bound exists
                continue
            if half_width is None:
                return new - n, baseline - m
            shrunk = half_width * math.sqrt((1 / new + 1 / baseline) / (1 / n + 1 / m))
            if shrunk < room and new <= max(2 * baseline, n):
                return new - n, baseline - m
    return max(MOST_RUNS - n, 1), max(MOST_RUNS - m, 0)


def pairs_needed(half_width: float | None, room: float, n: int) -> tuple[int, int]:
    """The same for ``n`` pairs: as many further runs on both sides."""
    for pairs in range(max(n + 1, GOOD_PAIRS), MOST_RUNS + 1):
        if half_width is None or half_width * math.sqrt(n / pairs) < room:
            return pairs - n, pairs - n
    return (max(MOST_RUNS - n, 1),) * 2
