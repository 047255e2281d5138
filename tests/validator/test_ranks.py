"""The signed-rank test against brute force and its promises. (The two-sample test is in ``test_gate.py``.)"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from validator.gate.ranks import ALPHA, GOOD_PAIRS, critical_signed_rank, pairs_needed, shift_of_pairs


@pytest.mark.parametrize("n", [1, 5, 7, 8, 11])
@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_critical_signed_rank_equals_brute_force(n: int, alpha: float) -> None:
    sums = [sum(r for r, up in zip(range(1, n + 1), signs, strict=True) if up) for signs in itertools.product((0, 1), repeat=n)]  # fmt: skip
    k = critical_signed_rank(n, alpha)
    share = [sum(w <= i for w in sums) / len(sums) for i in range(n * (n + 1) // 2 + 1)]
    assert (k == 0 and share[0] > alpha) or (share[k - 1] <= alpha < share[k])


def test_eight_pairs_are_the_fewest_with_room_for_one_wrong_sign() -> None:
    assert critical_signed_rank(GOOD_PAIRS) == 2 and critical_signed_rank(GOOD_PAIRS - 1) == 1
    assert critical_signed_rank(6) == 0  # 1/64 is above the level of 1 %
    assert shift_of_pairs([0.1] * 6).low is None


def test_hand_computed_interval() -> None:
    shift = shift_of_pairs([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], ALPHA)  # k = 1: the smallest and largest average
    assert (shift.low, shift.estimate, shift.high) == (1.0, 14.0, 64.0)


def test_the_interval_covers_the_truth_as_often_as_promised() -> None:
    rng = np.random.default_rng(5)
    missed = 0
    for _ in range(2000):
        shift = shift_of_pairs(rng.standard_cauchy(10) + 1.0, 0.05)
        assert shift.low is not None and shift.high is not None
        missed += not shift.low <= 1.0 <= shift.high
    assert 0.05 < missed / 2000 < 0.11  # 2 x 5 % at most, less because ranks are whole numbers


def test_pairs_asked_for_shrink_the_interval_enough() -> None:
    assert pairs_needed(None, 0.03, 3) == (5, 5)
    more, _ = pairs_needed(0.04, 0.03, 8)
    assert 0.04 * (8 / (8 + more)) ** 0.5 < 0.03 <= 0.04 * (8 / (7 + more)) ** 0.5
    assert pairs_needed(9.0, 0.03, 8) == (22, 22)
