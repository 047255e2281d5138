"""The yardstick itself, and that real runs record it."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from runtime.ledger import Ledger
from validator.measure.case import Case
from validator.measure.runner import measure
from validator.measure.yardstick import MOST_REPEATS, Yardstick


def test_it_allocates_nothing_after_set_up() -> None:
    yardstick = Yardstick()
    with (ledger := Ledger()):
        ledger.start_step()
        assert yardstick.seconds() > 0
        report = ledger.report()
    # tensors that it writes to existed before; the ledger counts each once, on sight
    held = sum(
        t.untyped_storage().nbytes()
        for t in (yardstick._product, yardstick._written, yardstick._sum, yardstick._repeats)
    )
    assert report.peak_bytes <= held


def test_longer_steps_are_looked_at_for_longer() -> None:
    yardstick, pieces = Yardstick(), []
    work = yardstick._work
    yardstick._work = lambda: (pieces.append(1), work())  # type: ignore[method-assign, assignment, func-returns-value]
    yardstick.seconds(0.0)
    assert len(pieces) == 1
    yardstick.seconds(1e6)
    assert len(pieces) == 1 + MOST_REPEATS
    assert "1 x" in yardstick.name


@pytest.mark.parametrize("n_gpus", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_real_runs_record_one_per_step(make_job, n_gpus: int) -> None:
    report = measure(Case(job=make_job(n_gpus=n_gpus), backend="cpu", steps=3, warmup=1, metered=False))
    assert len(report.provenance["yardstick_seconds"]) == len(report.provenance["step_seconds"]) == 3
    assert report.provenance["yardstick"].startswith(f"steplike-1, {n_gpus} x ")
    fake = measure(Case(job=make_job(n_gpus=n_gpus), backend="fake"))
    assert "yardstick" not in fake.provenance
