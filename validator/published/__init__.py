"""Training runs that other people published, held against forecasts with the shipped constants."""

from validator.published.evaluation import Evaluation, GroupError, RunForecast, evaluate
from validator.published.runs import PublishedRun, read_runs

__all__ = ["Evaluation", "GroupError", "PublishedRun", "RunForecast", "evaluate", "read_runs"]
