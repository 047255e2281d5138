"""``Strategy``: how the job is spread over GPUs and what is traded for memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from estimator.errors import invalid, require_choice, require_int
from estimator.units import MIB

Dtype = Literal["fp32", "fp16", "bf16"]
Offload = Literal["none", "optimizer", "optimizer,param"]
Recompute = Literal["none", "selective", "full"]
Optimizer = Literal["adamw", "adam", "sgd"]

OPTIMIZER_STATES: dict[str, int] = {"adamw": 2, "adam": 2, "sgd": 1}
"""fp32 state tensors per parameter: Adam keeps two moments, SGD one momentum buffer."""


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """ZeRO stage, offload, recompute, precision and parallel sizes.

    ZeRO shards over the data-parallel GPUs (``n_gpus / (tp * pp * cp)``). With a single
    data-parallel GPU there is nothing to shard and every stage runs as stage 0.
    """

    zero_stage: int = 0
    """0: replicate; 1: shard optimizer state; 2: and gradients; 3: and parameters (Rajbhandari et al. 2020)."""
    offload: Offload = "none"
    """What lives in host memory: nothing, the optimizer (masters, states, step), or parameters too."""
    recompute: Recompute = "none"
    """``selective`` keeps attention outputs and every second matmul's output and recomputes the rest of a
    block; ``full`` keeps only the block's input."""
    dtype: Dtype = "bf16"
    """Dtype of parameters, activations and gradients; fp16 and bf16 keep fp32 masters."""
    optimizer: Optimizer = "adamw"
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    bucket_bytes: int = 64 * MIB
    """Whole units (embedding, blocks, head) are put together until a bucket holds this many parameter bytes."""
    prefetch_depth: int = 1
    """Units whose parameters are fetched ahead of use (stage 3, parameter offload)."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        if type(self.zero_stage) is not int or self.zero_stage not in (0, 1, 2, 3):
            raise invalid("zero", self.zero_stage, "0, 1, 2 or 3")
        require_choice("offload", self.offload, get_args(Offload))
        require_choice("recompute", self.recompute, get_args(Recompute))
        require_choice("dtype", self.dtype, get_args(Dtype))
        require_choice("optimizer", self.optimizer, get_args(Optimizer))
        for field in ("tp", "pp", "cp", "ep", "bucket_bytes"):
            require_int(field, getattr(self, field))
        require_int("prefetch_depth", self.prefetch_depth, minimum=0)
        if (
            isinstance(self.grad_clip, bool)
            or not isinstance(self.grad_clip, int | float)
            or not 0 <= self.grad_clip < float("inf")
        ):
            raise invalid("grad_clip", self.grad_clip, "a number >= 0 (0 switches clipping off)")

    @property
    def offload_optimizer(self) -> bool:
        return self.offload != "none"

    @property
    def offload_param(self) -> bool:
        return self.offload == "optimizer,param"

    @property
    def model_parallel(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tp * self.pp * self.cp
