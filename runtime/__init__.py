"""The ZeRO training runtime: torch + torch.distributed, obeying the estimator's ``StepProgram``."""

from runtime.engine import Engine, initialize
from runtime.optimizer import OptimizerConfig

__all__ = ["Engine", "OptimizerConfig", "initialize"]
