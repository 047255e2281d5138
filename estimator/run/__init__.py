"""The whole run: days, dollars, kilowatt-hours, checkpoints, failures and goodput from the forecast of one step."""

from estimator.run.question import RunQuestion, token_count
from estimator.run.whole import RunReport, whole_run

__all__ = ["RunQuestion", "RunReport", "token_count", "whole_run"]
