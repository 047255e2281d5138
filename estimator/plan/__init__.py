"""From a question (model, cluster, batch) to ranked strategies, and a reason for every one that was rejected."""

from estimator.plan.question import PlanQuestion
from estimator.plan.search import Candidate, PlanResult, Rejection, alternatives, plan

__all__ = ["Candidate", "PlanQuestion", "PlanResult", "Rejection", "alternatives", "plan"]
