"""Budgets of errors of published runs: how large they may be before CI fails."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from estimator.errors import InputError, invalid, unknown_choice
from validator.published.evaluation import METRICS, GroupError

STATISTICS = {"median": "median_abs_pct", "p90": "p90_abs_pct", "bias": "bias_pct", "coverage": "coverage90_pct"}
_SPELLING = re.compile(r"(?:(?P<source>[^/=]*)/)?(?P<metric>[^/=:]+):(?P<statistic>[^/=:]+)=(?P<percent>[^=]+)")
_ALLOWED = "[SOURCE/]METRIC:STATISTIC=PERCENT, such as llm-foundry/step_time_s:median=5"


class PublishedBudget(NamedTuple):
    """How large a statistic of a metric may be (coverage: how small), for sources whose name has ``source``."""

    source: str
    metric: str
    statistic: str
    percent: float


def parse_published_budgets(texts: Sequence[str]) -> tuple[PublishedBudget, ...]:
    """``--budget`` as typed. Raises ``InputError``."""
    return tuple(map(_parse, texts))


def _parse(text: str) -> PublishedBudget:
    match = _SPELLING.fullmatch(text.strip())
    if match is None:
        raise invalid("--budget", text, _ALLOWED)
    if match["metric"] not in METRICS:
        raise unknown_choice(f"--budget {text}: the metric", match["metric"], METRICS)
    if match["statistic"] not in STATISTICS:
        raise unknown_choice(f"--budget {text}: the statistic", match["statistic"], tuple(STATISTICS))
    try:
        percent = float(match["percent"].removesuffix("%"))
    except ValueError:
        raise invalid("--budget", text, _ALLOWED) from None
    if not (percent >= 0 and math.isfinite(percent)):
        raise invalid("--budget", text, f"a percentage of 0 or more: {_ALLOWED}")
    return PublishedBudget(match["source"] or "", match["metric"], match["statistic"], percent)


def broken_budgets(groups: Sequence[GroupError], budgets: Sequence[PublishedBudget]) -> list[str]:
    """A sentence for every group that breaks a budget. Raises ``InputError`` for a budget of which no group has a figure."""
    failures = []
    for budget in budgets:
        field = STATISTICS[budget.statistic]
        chosen = [g for g in groups if budget.metric == g.metric and budget.source.lower() in g.source.lower()]
        known = [(g, value) for g in chosen if (value := getattr(g, field)) is not None]
        if not known:
            raise InputError(
                f"--budget {budget.source}/{budget.metric}:{budget.statistic} holds for no run; sources: "
                f"{', '.join(sorted({g.source for g in groups}))}"
            )
        for group, value in known:
            is_least = budget.statistic == "coverage"
            if value < budget.percent if is_least else abs(value) > budget.percent:
                failures.append(
                    f"{group.source} on {group.gpu}: {budget.statistic} of {budget.metric} over {group.n} runs is {value:.1f} %, "
                    f"{'below' if is_least else 'over'} {budget.percent:g} %"
                )
    return failures
