"""Budgets: how large an error may be before a comparison fails."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from estimator.errors import InputError, invalid, unknown_choice
from validator.compare.join import Comparison
from validator.compare.rows import SCALAR_TERMS, Row

GATED = ("peak_allocated_bytes", "step_s")
"""Terms that a budget without a term holds for."""
STATISTICS = ("worst", "median", "p90")
_SPELLING = re.compile(r"(?:(?P<term>[^=:]*)(?::(?P<statistic>[^=:]*))?=)?(?P<percent>[^=:]*)")
_ALLOWED = "PERCENT, TERM=PERCENT or TERM:STATISTIC=PERCENT, such as 5, step_s=15 or step_s:median=10"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How large one statistic of a term's absolute error may be."""

    term: str | None
    """``None``: every gated term without a budget of its own."""
    statistic: str = "worst"
    """One of ``STATISTICS``, over all cases."""
    limit: float
    """As a fraction."""


@dataclass(frozen=True, kw_only=True)
class Overrun:
    """A broken promise."""

    sentence: str
    size: float
    """The absolute error, as a fraction; infinite for what must be equal, is undefined or is missing."""


def parse_budgets(texts: Sequence[str]) -> tuple[Budget, ...]:
    """``--fail-over`` as typed. Raises ``InputError`` for a bad spelling and for two limits of the same statistic."""
    budgets = tuple(_parse(text) for text in texts)
    seen: set[tuple[str | None, str]] = set()
    for text, budget in zip(texts, budgets, strict=True):
        if (budget.term, budget.statistic) in seen:
            raise InputError(f"--fail-over {text} comes second for the same errors; allowed: one limit for each")
        seen.add((budget.term, budget.statistic))
    return budgets


def _parse(text: str) -> Budget:
    match = _SPELLING.fullmatch(text.strip())
    if match is None or match["term"] == "":
        raise invalid("--fail-over", text, _ALLOWED)
    statistic = match["statistic"]
    if statistic is not None and statistic not in STATISTICS:
        raise unknown_choice(f"--fail-over {text}: the statistic", statistic, STATISTICS)
    try:
        percent = float(match["percent"].strip().removesuffix("%"))
    except ValueError:
        raise invalid("--fail-over", text, _ALLOWED) from None
    if not (percent >= 0 and math.isfinite(percent)):
        raise invalid("--fail-over", text, f"a percentage of 0 or more: {_ALLOWED}")
    return Budget(term=match["term"], statistic=statistic or "worst", limit=percent / 100)


def judge(comparison: Comparison, budgets: Sequence[Budget], gated: Sequence[str] = GATED) -> tuple[Overrun, ...]:
    """Every broken promise: what must be equal and is not, then the largest error first.

    A budget without a term holds for those of ``gated`` that have none of their own. Raises ``InputError`` for a budget of
    a term that does not exist.
    """
    by_term: dict[str, list[Row]] = {}
    for row in comparison.rows:
        by_term.setdefault(row.term, []).append(row)
    own = {budget.term for budget in budgets if budget.term is not None}
    for term in own:
        if term not in by_term and term not in SCALAR_TERMS:
            raise unknown_choice("--fail-over: the term", term, {*by_term, *SCALAR_TERMS})
    found: list[Overrun] = []
    for budget in budgets:
        terms = [budget.term] if budget.term is not None else [term for term in gated if term not in own]
        present = [term for term in terms if term in by_term]
        if terms and not present:
            names = " or ".join(terms)
            sentence = f"nothing to gate: no run has both a forecast and a measurement of {names}"
            found.append(Overrun(sentence=sentence, size=math.inf))
        for term in present:
            found += _overruns(term, by_term[term], budget)
    wrong = [
        Overrun(
            sentence=f"{row.case}: {row.term} must be equal, predicted {row.predicted:g}, measured {row.measured:g}",
            size=math.inf,
        )
        for row in comparison.inexact
    ]
    return (*wrong, *sorted(found, key=lambda overrun: -overrun.size))


def _overruns(term: str, rows: Sequence[Row], budget: Budget) -> list[Overrun]:
    if budget.statistic == "worst":
        over = [row for row in rows if row.size > budget.limit]
        return [Overrun(sentence=_row_sentence(row, budget), size=row.size) for row in over]
    import numpy as np  # which takes a tenth of a second to load

    sizes = [row.size for row in rows]
    defined = all(math.isfinite(size) for size in sizes)
    quantile = 0.5 if budget.statistic == "median" else 0.9
    size = float(np.quantile(sizes, quantile, method="linear" if defined else "higher"))
    if size <= budget.limit:
        return []
    said = "undefined" if math.isinf(size) else f"{size:.1%}"
    name = "median" if budget.statistic == "median" else "P90"
    sentence = f"{term}: {name} error over {len(rows)} runs is {said}, over {100 * budget.limit:g} %"
    return [Overrun(sentence=sentence, size=size)]


def _row_sentence(row: Row, budget: Budget) -> str:
    error = "undefined" if row.error is None else f"{row.error:+.1%}"
    return (
        f"{row.case}: {row.term} predicted {row.predicted:.6g}, measured {row.measured:.6g}, "
        f"error {error} is over {100 * budget.limit:g} %"
    )
