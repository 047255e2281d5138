"""What the charts' axes show."""

from __future__ import annotations

import pytest

pytest.importorskip("altair", reason="needs altair")

from dashboard.charts import error_bars


@pytest.mark.parametrize(
    ("errors", "domain"),
    [((1e-7, -2e-7), [-1.0, 1.0]), ((0.5, 0.01), [-1.0, 50.0]), ((-0.25, None), [-25.0, 1.0])],
)
def test_errors_of_nothing_look_like_nothing(errors, domain):
    rows = [{"label": str(i), "error": error} for i, error in enumerate(errors)]
    assert error_bars(rows).to_dict()["encoding"]["x"]["scale"]["domain"] == domain
