"""Holds predictions against measurements: a join on the job key, term by term; error tables, blame and budgets."""

from validator.compare.blame import REST, Blame
from validator.compare.budgets import GATED, Budget, Overrun, judge, parse_budgets
from validator.compare.errors import (
    GROUPINGS,
    GroupSummary,
    TermSummary,
    group_errors,
    group_rows,
    settings_of,
    spearman,
    summarise,
)
from validator.compare.forecast import Compared, Source, compare_records, compare_sources, profile_of
from validator.compare.join import Comparison, Verdict, compare, predict_for
from validator.compare.rows import SCALAR_TERMS, Row, gpu_name, label_of

__all__ = [
    "GATED", "GROUPINGS", "REST", "SCALAR_TERMS", "Blame", "Budget", "Compared", "Comparison", "GroupSummary", "Overrun", "Row",
    "Source", "TermSummary", "Verdict", "compare", "compare_records", "compare_sources", "gpu_name", "group_errors",
    "group_rows", "judge", "label_of", "parse_budgets", "predict_for", "profile_of", "settings_of", "spearman", "summarise",
]  # fmt: skip
