"""``Strategy``: how the job is spread over GPUs and what is traded for memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from estimator.errors import invalid, require_choice, require_int
from estimator.job.grouping import check_groups
from estimator.job.kernels import KERNELS
from estimator.job.offload import check_offload
from estimator.units import MIB

Dtype = Literal["fp32", "fp16", "bf16"]
GradDtype = Literal["model", "fp32"]
Offload = Literal["none", "optimizer", "optimizer,param", "optimizer:nvme"]
Recompute = Literal["none", "selective", "full"]
Optimizer = Literal["adamw", "adam", "sgd"]

GradCompression = Literal["none", "one_bit", "adacomp"]

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
    """What lives in host memory: nothing, the optimizer (masters, states, step), or parameters too; ``optimizer:nvme``: the step
    is the host's, and masters and states live in files."""
    recompute: Recompute = "none"
    """``selective`` keeps attention outputs and every second matmul's output and recomputes the rest of a
    block; ``full`` keeps only the block's input."""
    dtype: Dtype = "bf16"
    """Dtype of parameters, activations and gradients; fp16 and bf16 keep fp32 masters."""
    grad_dtype: GradDtype = "model"
    """In what gradients are accumulated and reduced: ``model`` is ``dtype``; ``fp32`` adds every low-precision gradient to an
    fp32 buffer, which doubles its bytes and those on the wire."""
    optimizer: Optimizer = "adamw"
    shard_size: int = 0
    """Ranks that share one sharded copy of the states, consecutive ones; such groups are replicas of each other, whose
    gradients are summed once per step (FSDP's hybrid shard; MiCS, Zhang et al. 2022). 0: all data-parallel ranks."""
    quantized_weights: bool = False
    """Stage 3 gathers parameters as int8, a scale for every 256 (qwZ of ZeRO++, Wang et al. 2023): half of bf16's bytes. What
    is stepped stays exact."""
    secondary_shard: int = 0
    """Stage 3 keeps a second copy of the parameters, sharded over groups of so many consecutive ranks (a node's), from which
    every gather after a step's first comes (hpZ of ZeRO++): nothing but the first crosses nodes. 0: none."""
    quantized_grads: int = 0
    """Stages 2 and 3 sum gradients as int4, a scale for every 256, in two hops (qgZ of ZeRO++): inside groups of so many
    consecutive ranks (a node's), then across them. 0: not."""
    grad_compression: GradCompression = "none"
    """Stages 0 and 1, in every step; what is lost is added to the next step's gradients. ``one_bit``: signs, a scale for
    every 1,024 (error feedback of 1-bit Adam, Tang et al. 2021, on gradients as in Seide et al. 2014). ``adacomp``: those
    that stand out among 512 neighbours, at most an eighth of all (Chen et al. 2018)."""
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    bucket_bytes: int = 64 * MIB
    """Whole units (embedding, blocks, head) are put together until a bucket holds this many parameter bytes."""
    prefetch_depth: int = 1
    """Units whose parameters are fetched ahead of use (stage 3, parameter offload). It is the rate limit too: at most so
    many units are held or on their way beside the one in use."""
    persistent_numel: int = 0
    """Where parameters come and go (stage 3, parameter offload): those of at most so many elements stay on the device as under
    stage 2, put together to ``bucket_bytes`` (DeepSpeed's ``stage3_param_persistence_threshold``)."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    offload_fraction: float = 1.0
    """With offload ``optimizer``: the part of each rank's optimizer shard whose masters, states and step are on the host; the
    device steps the rest at the same time (Twin-Flow of ZeRO-Offload++, DeepSpeed 2023)."""
    delayed_update: bool = False
    """With offload ``optimizer``: the host steps the gradients of one training step while the device computes the next, whose
    parameters are therefore one step old (ZeRO-Offload, Ren et al. 2021, section 5.2)."""
    kernels_off: tuple[str, ...] = ()
    """CUDA kernels of the runtime that are switched off (names of ``estimator.ops.kernels.KERNELS``, or ``all``): plain
    torch works in their place. A CPU has none of them in any case."""

    def __post_init__(self) -> None:
        if type(self.zero_stage) is not int or self.zero_stage not in (0, 1, 2, 3):
            raise invalid("zero", self.zero_stage, "0, 1, 2 or 3")
        require_choice("offload", self.offload, get_args(Offload))
        require_choice("recompute", self.recompute, get_args(Recompute))
        require_choice("dtype", self.dtype, get_args(Dtype))
        require_choice("grad_dtype", self.grad_dtype, get_args(GradDtype))
        if self.dtype == "fp32":
            object.__setattr__(self, "grad_dtype", "model")  # the same thing, under one name
        require_choice("optimizer", self.optimizer, get_args(Optimizer))
        require_choice("grad_compression", self.grad_compression, get_args(GradCompression))
        for field in ("tp", "pp", "cp", "ep", "bucket_bytes"):
            require_int(field, getattr(self, field))
        require_int("prefetch_depth", self.prefetch_depth, minimum=0)
        require_int("persistent_numel", self.persistent_numel, minimum=0)
        check_groups(self)
        if (
            isinstance(self.grad_clip, bool)
            or not isinstance(self.grad_clip, int | float)
            or not 0 <= self.grad_clip < float("inf")
        ):
            raise invalid("grad_clip", self.grad_clip, "a number >= 0 (0 switches clipping off)")
        check_offload(self)
        if isinstance(self.kernels_off, str) or not isinstance(self.kernels_off, Iterable):
            raise invalid("kernels_off", self.kernels_off, "a list of names of kernels, or of the word all")
        for name in self.kernels_off:
            require_choice("kernels_off", name, ("all", *KERNELS))
        object.__setattr__(self, "kernels_off", tuple(sorted(set(self.kernels_off))))

    @property
    def grads(self) -> Dtype:
        """Dtype of the gradients that are kept, reduced and stepped with."""
        return self.dtype if self.grad_dtype == "model" else "fp32"

    @property
    def offload_optimizer(self) -> bool:
        return self.offload != "none"

    @property
    def offload_param(self) -> bool:
        return self.offload == "optimizer,param"

    @property
    def offload_words(self) -> str:
        """What is offloaded and how, for people."""
        part = f" {self.offload_fraction:g}" if self.offload_fraction < 1 else ""
        return self.offload + part + (" delayed" if self.delayed_update else "")

    @property
    def offload_nvme(self) -> bool:
        return self.offload == "optimizer:nvme"

    @property
    def model_parallel(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tp * self.pp * self.cp
