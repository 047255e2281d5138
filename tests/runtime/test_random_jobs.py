"""Random jobs of all that a ``Strategy`` can say hold and send what is forecast: ``tests.runtime.random_jobs``."""

from __future__ import annotations

from itertools import chain

import pytest

from tests.runtime.random_jobs import AXES, CHOICES, GROUPS, OFFLOADS, PIPELINES, RECOMPUTES, SHARE, check, draw

NUMBER = 400
QUICK = (1, 4, 36, 100, 222)
"""Five of those that once found something."""


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=() if seed in QUICK else pytest.mark.slow) for seed in range(NUMBER)]
)
def test_a_random_job_holds_and_sends_what_is_forecast(seed: int) -> None:
    check(draw(seed))


@pytest.mark.slow
def test_every_choice_takes_its_turn() -> None:
    jobs = [draw(seed).job for seed in range(NUMBER)]
    assert len({job.key for job in jobs}) == NUMBER
    assert {job.cluster.n_gpus for job in jobs} >= {1, 4096} and len({job.model.name for job in jobs}) >= 15
    single = ({name: value} for name, values in CHOICES.items() for value in values if name != "kernels_off")
    for fields in chain(AXES, PIPELINES, GROUPS, OFFLOADS, RECOMPUTES, single):
        assert any(all(getattr(job.strategy, name) == value for name, value in fields.items()) for job in jobs), fields
    assert len(SHARE) == 5
