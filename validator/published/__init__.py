"""Training runs that other people published, held against forecasts with the shipped constants."""

from validator.published.budgets import broken_budgets, parse_published_budgets
from validator.published.evaluation import Evaluation, GroupError, RunForecast, evaluate
from validator.published.runs import PublishedRun, read_runs

__all__ = [
    "Evaluation",
    "GroupError",
    "PublishedRun",
    "RunForecast",
    "broken_budgets",
    "evaluate",
    "parse_published_budgets",
    "read_runs",
]
