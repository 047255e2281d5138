"""What can be forecast and not run: other frameworks' steps, and operators that only they have."""

from __future__ import annotations

from torch import nn

from estimator.errors import InputError
from estimator.job.framework import FRAMEWORKS
from estimator.job.optimizers import OPTIMIZERS
from estimator.job.strategy import Strategy
from runtime.models.decoder import Decoder
from runtime.models.encoder import EncoderModel
from runtime.models.encoder_decoder import EncoderDecoder
from runtime.models.stage import DecoderStage
from runtime.models.vision import VisionModel

RUN_HERE = (*(name for name, facts in OPTIMIZERS.items() if facts.flat), "adamw8bit")
"""Optimizers whose step is the same for every element, wherever shards are cut; blocks of 8-bit states are those of a shard."""
_REFERENCE_MODELS = (Decoder, DecoderStage, EncoderModel, EncoderDecoder, VisionModel)


def check_runs(model: nn.Module, strategy: Strategy) -> None:
    """Raises ``InputError`` for what this runtime cannot do with ``model``."""
    if strategy.framework != "zerocast":
        raise InputError(
            f"framework is {strategy.framework!r}; a step of {FRAMEWORKS[strategy.framework].title} is only forecast, allowed here: "
            "zerocast"
        )
    if strategy.matmul_dtype != "model":
        raise InputError(
            f"matmul_dtype is {strategy.matmul_dtype!r}, which is only forecast; this runtime multiplies in dtype, allowed: model"
        )
    if strategy.optimizer not in RUN_HERE:
        raise InputError(
            f"optimizer is {strategy.optimizer!r}, whose step is only forecast with ZeRO's flat shards; allowed: {', '.join(RUN_HERE)}"
        )
    if strategy.attention != "flash" and not isinstance(model, _REFERENCE_MODELS):
        raise InputError(
            f"attention is {strategy.attention!r}, but {type(model).__name__} attends in its own way; allowed: flash, or a model of "
            "runtime.models"
        )
