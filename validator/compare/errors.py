"""Error distributions: of each term, and of each term within groups of cases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimator.errors import require_choice
from estimator.report import StepReport
from validator.compare.rows import Row, gpu_name

if TYPE_CHECKING:
    import numpy as np  # statistics alone need it: every command that reads a profile imports this module

GROUPINGS = ("backend", "stage", "offload", "recompute", "dtype", "model", "gpu", "world")
"""What cases can be grouped by. ``stage`` is the ZeRO stage asked for, ``world`` the number of GPUs of the job."""


@dataclass(frozen=True, kw_only=True)
class TermSummary:
    """Errors of one term over some cases, as fractions."""

    term: str
    n: int
    """Rows with an error."""
    n_undefined: int
    """Rows where 0 was measured and something predicted."""
    median: float | None
    """Of the absolute error, like ``p90`` and ``worst``."""
    p90: float | None
    worst: float | None
    bias: float | None
    """Mean signed error: above 0 when predictions are too high."""
    largest: float
    """Largest absolute difference in the term's own unit, those without an error included: whether a large error is one
    of a few bytes."""


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """Errors of one term over the cases of one group."""

    by: str
    """One of ``GROUPINGS``."""
    group: str
    """What the group's cases share, e.g. ``"fake"`` or ``"optimizer,param"``."""
    summary: TermSummary


def settings_of(report: StepReport) -> dict[str, str]:
    """The report's group under each of ``GROUPINGS``; ``"unknown"`` where its job does not say."""
    job = report.job
    cluster, strategy = job.get("cluster") or {}, job.get("strategy") or {}
    found = {
        "backend": report.origin,
        "stage": strategy.get("zero_stage"),
        "offload": strategy.get("offload"),
        "recompute": strategy.get("recompute"),
        "dtype": strategy.get("dtype"),
        "model": (job.get("model") or {}).get("name"),
        "gpu": gpu_name(report) or None,
        "world": cluster.get("n_gpus"),
    }
    return {name: "unknown" if found[name] is None else str(found[name]) for name in GROUPINGS}


def summarise(rows: Sequence[Row]) -> tuple[TermSummary, ...]:
    """Error distribution of each term, in the order in which terms first appear."""
    by_term: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_term[row.term].append(row)
    return tuple(_summary(term, members) for term, members in by_term.items())


def group_rows(rows: Sequence[Row], settings: Mapping[str, Mapping[str, str]], by: str) -> dict[str, list[Row]]:
    """``rows`` by their case's group under ``by``, numbers in their order before names.

    ``settings`` are ``Comparison.settings``. Raises ``InputError`` when ``by`` is none of ``GROUPINGS``.
    """
    require_choice("by", by, GROUPINGS)
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.origin if by == "backend" else settings[row.job_key][by]].append(row)
    return {name: groups[name] for name in sorted(groups, key=_place)}


def group_errors(
    rows: Sequence[Row], settings: Mapping[str, Mapping[str, str]], by: str, terms: Sequence[str]
) -> tuple[GroupSummary, ...]:
    """Error distribution of each of ``terms`` within each group, term by term; what has no rows is left out."""
    found = []
    for term in terms:
        chosen = [row for row in rows if row.term == term]
        for group, members in group_rows(chosen, settings, by).items():
            found.append(GroupSummary(by=by, group=group, summary=summarise(members)[0]))
    return tuple(found)


def _place(group: str) -> tuple[int, int, str]:
    return (0, int(group), "") if group.isdecimal() else (1, group != "none", group)


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation with average ranks for ties; ``None`` when a side holds fewer than two values."""
    if len(x) != len(y):
        raise ValueError(f"spearman needs as many x as y, not {len(x)} and {len(y)}")
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    import numpy as np

    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Rank of each value from 1; equal values share the average of theirs."""
    import numpy as np

    _, group, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[group])


def _summary(term: str, rows: Sequence[Row]) -> TermSummary:
    import numpy as np

    known = np.array([row.error for row in rows if row.error is not None], dtype=np.float64)
    size = np.abs(known)
    some = known.size > 0
    return TermSummary(
        term=term,
        n=int(known.size),
        n_undefined=len(rows) - int(known.size),
        median=float(np.median(size)) if some else None,
        p90=float(np.percentile(size, 90)) if some else None,
        worst=float(size.max()) if some else None,
        bias=float(known.mean()) if some else None,
        largest=max(abs(row.predicted - row.measured) for row in rows),
    )
