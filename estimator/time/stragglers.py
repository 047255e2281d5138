"""What waiting for the slowest of N ranks costs: the expected maximum of N normal step times.

Ranks that do the same work take slightly different time (clocks under a power limit, noise of the host), and every collective waits
for the last. With relative standard deviation ``s`` of one rank's time the step takes ``1 + s e(N)`` times the mean, where ``e(N)`` is
the expected maximum of N standard normals: 0 for one, 1.42 for 8, 3.24 for 1,000, 4.29 for 65,536. It grows as ``sqrt(2 ln N)``
(Gumbel), so that stragglers are felt from the first node on and hardly more at scale.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from math import erfc, exp, inf, log1p, sqrt

from estimator.errors import require_int
from estimator.job.fields import number

_LOW, _HIGH, _POINTS, _ZERO = -10.0, 12.0, 2200, 1000
_STEP = (_HIGH - _LOW) / _POINTS
_NOTHING, _ALL = -746.0, -5e-17
"""Exponentials of less are 0, of more 1, to the last bit."""


@lru_cache(maxsize=256)
def expected_maximum(n: int) -> float:
    """Mean of the largest of ``n`` independent standard normal numbers, to 1e-6.

    ``E = integral over x > 0 of 1 - F(x)^n, less that over x < 0 of F(x)^n`` (trapezoids; David & Nagaraja, Order Statistics, 3.1).
    Raises ``InputError`` for ``n`` below 1.
    """
    require_int("n", n)
    if n == 1:
        return 0.0
    grid = range(_POINTS + 1)
    rise, one = (bisect_left(grid, power / n, key=lambda i: _log_below(_at(i))) for power in (_NOTHING, _ALL))
    total = max(0.0, rise - _ZERO - 0.5)  # ones from x = 0 on, while F(x)^n is nothing
    for i in range(rise, one):
        x = _at(i)
        power = exp(n * _log_below(x))
        weight = 0.5 if i in (0, _POINTS) else 1.0
        total += weight * ((1.0 - power) if x > 0 else 0.5 - power if x == 0 else -power)
    return total * _STEP


def _at(i: int) -> float:
    return _LOW + i * _STEP


def _log_below(x: float) -> float:
    """Logarithm of ``F(x)``."""
    tail = 0.5 * erfc(x / sqrt(2.0))
    return log1p(-tail) if tail < 1.0 else -inf


def straggler_share(n_ranks: int, spread: float, *, meetings: float = 1.0) -> float:
    """Expected delay by the slowest of ``n_ranks``, as a share of the mean step time.

    ``spread``: relative standard deviation of one rank's step time. ``meetings``: collectives per step at which all wait for each
    other, if what makes ranks differ is drawn anew between them: a part's deviation is ``spread / sqrt(meetings)`` of the step, and
    the parts' maxima add up. 1: a rank that is slow is so for the whole step. Raises ``InputError``.
    """
    spread = number("spread", spread)
    meetings = number("meetings", meetings, 1.0)
    return spread * sqrt(meetings) * expected_maximum(n_ranks)
