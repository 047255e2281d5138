"""The ZeRO training runtime: torch + torch.distributed, obeying the estimator's ``StepProgram``."""

from runtime.engine import Engine, initialize
from runtime.faults import LostRankError, process_group
from runtime.offload.states import NvmePlace
from runtime.optimizer import OptimizerConfig
from runtime.param_groups import ParamGroup

__all__ = ["Engine", "LostRankError", "NvmePlace", "OptimizerConfig", "ParamGroup", "initialize", "process_group"]
