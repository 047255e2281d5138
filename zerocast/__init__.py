"""Zerocast forecasts what a ZeRO training step costs, and measures real steps to prove the forecast.

The public names are loaded when they are first used, so that ``import zerocast`` costs nothing::

    from zerocast import ModelSpec, Job, predict, plan, initialize, measure
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from estimator.errors import InputError as InputError
    from estimator.job import Job as Job
    from estimator.job import ModelSpec as ModelSpec
    from estimator.memory.allocator_settings import AllocatorSettings as AllocatorSettings
    from estimator.plan import plan as plan
    from estimator.predict import predict as predict
    from estimator.report import StepReport as StepReport
    from runtime import initialize as initialize
    from runtime.tracing import trace as trace
    from validator.measure.runner import measure as measure

_HOMES = {
    "AllocatorSettings": "estimator.memory.allocator_settings",
    "InputError": "estimator.errors",
    "Job": "estimator.job",
    "ModelSpec": "estimator.job",
    "StepReport": "estimator.report",
    "initialize": "runtime",
    "measure": "validator.measure.runner",
    "plan": "estimator.plan",
    "predict": "estimator.predict",
    "trace": "runtime.tracing",
}

__all__ = [
    "AllocatorSettings", "InputError", "Job", "ModelSpec", "StepReport", "initialize", "measure", "plan", "predict", "trace",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
