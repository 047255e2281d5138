"""The engine trains as plain single-process PyTorch does, and moves exactly the forecast bytes.

fp32 is bit-equal wherever additions have the same order: one and two ranks (a + b = b + a). Four ranks are summed by gloo
in an order of its own. bf16 and fp16 with one or two ranks are bit-equal too; with four ranks the rounding of sums
differs within ``runtime.reference.TOLERANCES``.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch

from estimator.predict import lay_out
from estimator.schedule.events import Collective
from runtime.reference import TOLERANCES, relative_difference
from tests.runtime import tiny
from tests.runtime.groups import run_ranks
from tests.runtime.parity_worker import EXTRA, MATRIX, Case, Outcome, run_plain, worker

pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[Case, Outcome]:
    """Every selected case, run once: one group of processes per world size."""
    wanted = {
        item.callspec.params["case"]
        for item in request.session.items
        if "outcomes" in getattr(item, "fixturenames", ()) and "case" in item.callspec.params  # type: ignore[attr-defined]
    }
    return outcomes_of([case for case in (*MATRIX, *EXTRA) if case in wanted], tmp_path_factory.mktemp("outcomes"))


def outcomes_of(cases: list[Case], folder: Path) -> dict[Case, Outcome]:
    """Every case, run once: one group of processes per world size, which write into ``folder``."""
    results: dict[Case, Outcome] = {}
    for world in sorted({case.world for case in cases}):
        place = folder / str(world)
        place.mkdir()
        run_ranks(worker, world, str(place), [case for case in cases if case.world == world])
        saved = torch.load(place / "outcomes.pt")
        results |= {Case(*case): Outcome(*outcome) for case, outcome in saved.items()}
    return results


@lru_cache(maxsize=64)
def plain(case: Case) -> Outcome:
    return run_plain(case)


def reference(case: Case) -> Outcome:
    """Offload and recomputation change nothing; stages only the order of additions."""
    return plain(case._replace(offload="none", recompute="none", stage=2 if case.stage >= 2 and case.world > 1 else 0))


def assert_within_tolerance(case: Case, got: Outcome, want: Outcome) -> None:
    allowed = TOLERANCES[case.dtype]
    assert relative_difference(got.params, want.params) <= allowed.params
    assert got.losses == pytest.approx(want.losses, rel=allowed.loss)


def name(case: Case) -> str:
    return "-".join(str(x) for x in case)


def selected(cases: list[Case], one_in: int) -> list:
    """One in so many of ``cases`` in every run (each value of each axis), the others where time is no matter."""
    return [
        pytest.param(c, marks=() if i % one_in == (i // 12) % one_in else pytest.mark.slow, id=name(c))
        for i, c in enumerate(cases)
    ]


@pytest.mark.parametrize("case", selected(MATRIX, 9))
def test_training_equals_plain_pytorch(case: Case, outcomes: dict[Case, Outcome]) -> None:
    got, want = outcomes[case], reference(case)
    assert len(got.losses) == 20 and got.losses[-1] < got.losses[0]
    assert got.params.keys() == want.params.keys()
    joined = [torch.cat([p.flatten() for p in o.params.values()]) for o in (got, want)]
    if case.world <= 2:
        assert torch.equal(*joined)
        assert got.losses == pytest.approx(want.losses, rel=1e-6)
    else:
        assert_within_tolerance(case, got, want)


@pytest.mark.parametrize("case", selected(EXTRA, 5))
def test_clipping_recompute_and_fp16_equal_plain_pytorch(case: Case, outcomes: dict[Case, Outcome]) -> None:
    """Clipping divides by a norm whose terms are added in another order, so equality is to rounding."""
    got, want = outcomes[case], reference(case)
    assert_within_tolerance(case, got, want)


@pytest.mark.parametrize("case", [*selected(MATRIX, 9), *selected(EXTRA, 5)])
def test_bytes_on_the_wire_are_the_forecast(case: Case, outcomes: dict[Case, Outcome]) -> None:
    job = tiny.job(case.model, case.strategy, world=case.world, n_micro_batches=case.accumulation)
    bytes_, calls = {}, {}
    for section in lay_out(job).program.step:
        for event in section.events:
            if isinstance(event, Collective):
                bytes_[event.op] = bytes_.get(event.op, 0) + event.n_bytes * section.repeat
                calls[event.op] = calls.get(event.op, 0) + section.repeat
    assert (outcomes[case].bytes, outcomes[case].calls) == (bytes_, calls)
    assert bool(bytes_) == (case.world > 1)
