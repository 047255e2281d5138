"""The expected slowest of N ranks."""

from __future__ import annotations

from math import log, pi, sqrt
from statistics import NormalDist

import pytest

from estimator.errors import InputError
from estimator.time.stragglers import expected_maximum, straggler_share


def test_small_numbers_are_known_exactly() -> None:
    """David & Nagaraja: 1/sqrt(pi), 3/(2 sqrt(pi)), and tables (Harter 1961)."""
    assert expected_maximum(1) == pytest.approx(0.0, abs=1e-9)
    assert expected_maximum(2) == pytest.approx(1 / sqrt(pi), abs=1e-6)
    assert expected_maximum(3) == pytest.approx(1.5 / sqrt(pi), abs=1e-6)
    assert expected_maximum(8) == pytest.approx(1.42360, abs=1e-5)
    assert expected_maximum(100) == pytest.approx(2.50759, abs=1e-5)
    assert expected_maximum(1000) == pytest.approx(3.24144, abs=1e-5)


@pytest.mark.parametrize("n", [8, 64, 1024, 16_384, 1_000_000])
def test_blom_and_gumbel_agree(n: int) -> None:
    blom = NormalDist().inv_cdf((n - 0.375) / (n + 0.25))
    root = sqrt(2 * log(n))
    gumbel = root - (log(log(n)) + log(4 * pi)) / (2 * root) + 0.5772 / root
    assert expected_maximum(n) == pytest.approx(blom, rel=0.02)
    assert expected_maximum(n) == pytest.approx(gumbel, rel=0.08)


def test_the_share_of_a_step() -> None:
    assert straggler_share(1, 0.02) == pytest.approx(0.0, abs=1e-9)
    assert straggler_share(8, 0.01) == pytest.approx(0.0142360, rel=1e-4)
    assert straggler_share(8, 0.01, meetings=4) == pytest.approx(2 * straggler_share(8, 0.01))
    shares = [straggler_share(n, 0.01) for n in (1, 2, 8, 64, 4096)]
    assert shares == sorted(shares)
    for wrong in (
        {"n_ranks": 0, "spread": 0.1},
        {"n_ranks": 8, "spread": -0.1},
        {"n_ranks": 8, "spread": 0.1, "meetings": 0.5},
    ):
        with pytest.raises(InputError):
            straggler_share(**wrong)  # type: ignore[arg-type]
