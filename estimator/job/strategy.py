"""``Strategy``: how the job is spread over GPUs and what is traded for memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from estimator.errors import invalid, require_choice, require_int
from estimator.job.context import ContextKind
from estimator.job.experts import check_expert_parallel
from estimator.job.framework import FRAMEWORKS, AttentionKernel, Framework, MatmulDtype, check_framework
from estimator.job.grouping import check_groups
from estimator.job.kernels import KERNELS
from estimator.job.offload import check_offload
from estimator.job.optimizers import OPTIMIZERS, OptimizerImpl, check_optimizer
from estimator.job.optimizers import Optimizer as Optimizer
from estimator.job.pipeline import PipelineSchedule, check_pipeline
from estimator.job.precision import check_precision
from estimator.job.recompute import Recompute as Recompute
from estimator.job.recompute import check_recompute
from estimator.job.servers import Sync, check_servers
from estimator.units import DTYPE_BYTES, MIB

Dtype = Literal["fp32", "fp16", "bf16"]
GradDtype = Literal["model", "fp32"]
StateDtype = Literal["fp32", "model"]
Offload = Literal["none", "optimizer", "optimizer,param", "optimizer:nvme"]

DEFAULT_BUCKET_BYTES = 64 * MIB

GradCompression = Literal["none", "one_bit", "adacomp"]

OPTIMIZER_STATES: dict[str, int] = {name: facts.n_states for name, facts in OPTIMIZERS.items()}
"""State tensors with a number for every parameter: Adam keeps two moments, SGD one momentum buffer."""


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
    recompute: str = "none"
    """``selective`` keeps attention outputs and every second matmul's output and recomputes the rest of a
    block; ``full`` keeps only the block's input. Or parts of a block, joined by commas: ``attention``, ``mlp``, ``norms``,
    ``activation`` (``estimator.job.recompute.PARTS``)."""
    dtype: Dtype = "bf16"
    """Dtype of parameters, activations and gradients; fp16 and bf16 keep fp32 masters."""
    grad_dtype: GradDtype = "model"
    """In what gradients are accumulated and reduced: ``model`` is ``dtype``; ``fp32`` adds every low-precision gradient to an
    fp32 buffer, which doubles its bytes and those on the wire."""
    master_dtype: StateDtype = "fp32"
    """``model``: a bf16 model has no fp32 masters; its parameters are stepped themselves, in fp32 arithmetic, and rounded to
    nearest (pure bf16 training, as in torchtitan; DeepSpeed's ``bf16_master_weights_and_grads``)."""
    state_dtype: StateDtype = "fp32"
    """``model``: a bf16 model's optimizer states are bf16 too (DeepSpeed's ``bf16_optimizer_states``)."""
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
    compression_warmup_steps: int = 0
    """With ``one_bit``: so many first steps exchange exact gradients; then Adam's second moment is frozen, and under stage 0
    without offload it is momentum that is compressed (1-bit Adam, Tang et al. 2021, algorithm 1)."""
    sparse_embeddings: bool = False
    """Stages 0 and 1: of an untied token embedding's gradient ranks exchange the rows that their tokens use, with their numbers,
    instead of the whole table (DeepSpeed's ``sparse_gradients``)."""
    tp: int = 1
    sequence_parallel: bool = True
    """With ``tp``: what lies between attention and MLP (norms, residual stream) is split by tokens over the tensor-parallel
    ranks (Korthikanti et al. 2022); False: each works on all of it."""
    pp: int = 1
    pp_schedule: PipelineSchedule = "1f1b"
    """In which order pipeline ranks run forward and backward passes: ``estimator.schedule.pipeline``."""
    virtual_pp: int = 1
    """Chunks of the model on each pipeline rank (``interleaved_1f1b`` only)."""
    pp_layers: tuple[int, ...] = ()
    """Blocks of each stage, ``pp * virtual_pp`` of them in the model's order; empty: divided as evenly as can be. The first
    stage also has the embedding, the last the head."""
    cp: int = 1
    """GPUs that share every sequence: each has an equal part of its tokens."""
    cp_kind: ContextKind = "ulysses"
    """How these attend to all of it. ``ulysses``: inside attention each has a part of the heads instead, which all-to-alls exchange
    (Jacobs et al. 2023); ``ring``: keys and values go around (Liu et al. 2023)."""
    ep: int = 1
    """Data ranks, consecutive ones, that share the experts of every layer: each holds equally many, and tokens go to the ranks of
    their experts and back (Lepikhin et al. 2021). Experts' states are sharded over the ranks that hold the same ones."""
    expert_imbalance: float = 1.0
    """With ``ep`` and without a capacity: rows that come to the rank with most of them, over the mean of all. It says for which
    rank memory and time are forecast; what a router really does is not known beforehand."""
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
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
    recompute_every: int = 1
    """Blocks 0, k, 2 k, ... recompute; the others keep everything."""
    activation_offload: bool = False
    """With ``recompute`` ``full`` or ``selective``: the inputs of blocks that recompute wait for their backward pass in pinned host
    memory, except the last block's (Rajbhandari et al. 2021, section 5.1.2)."""
    sync: Sync = "allreduce"
    """How data-parallel ranks come to the same parameters. ``parameter_server``: they push gradients to the first ``n_servers`` of them,
    which own masters and states, step them, and from which all pull the new parameters (Li et al. 2014)."""
    n_servers: int = 1
    """Ranks that are parameter servers beside their work, each of an equal part of every bucket."""
    staleness: int = 0
    """With parameter servers: every step ends with the update by the gradients that were pushed so many steps before, so that
    pushes may take so long and no rank is further ahead of another (bounded delay, Ho et al. 2013). 0: synchronous."""
    framework: Framework = "zerocast"
    """Whose training step is forecast: this project's runtime's, which alone can run here, or another framework's."""
    compile: bool = False
    """Blocks run through torch.compile (frameworks other than this project's runtime)."""
    compile_loss: bool = False
    """So does the loss: it reads the logits, which are kept, and makes their gradient of them (torchtitan since 2025)."""
    root_apart: bool = False
    """FSDP2: the embedding is a unit of its own, and so is the head with the last norm, which stays after the forward pass, as in torchtitan
    since 0.2. False, or with tied embeddings: what is of no block is one unit, and stays."""
    grad_fusion: bool = True
    """Megatron-LM's products add weights' gradients to where they are kept; False: passes of their own do (its
    ``--no-gradient-accumulation-fusion``, and its versions before 2022)."""
    whole_recompute: bool = False
    """Of frameworks on PyTorch's checkpoint: recomputation of a block runs all of it again, as with reentrance, and before torch 2.1 in
    any case; False: it ends with the last tensor that backward needs (``FrameworkProfile.early_stop``)."""
    attention: AttentionKernel = "flash"
    """``efficient``: torch's memory-efficient kernel; ``math`` and ``eager``: all scores exist, in torch's SDPA or written out."""
    matmul_dtype: MatmulDtype = "model"
    """``fp8``: the linear layers of blocks multiply in fp8."""
    optimizer_impl: OptimizerImpl = "fused"
    """With framework fsdp1 or fsdp2: torch's optimizer steps in one kernel (``fused=True``, as torchtitan), or operator by operator over
    lists of all parameters, which is torch's own default on GPUs and has temporaries as large as a state."""
    overlap_comm: bool | None = None
    """DeepSpeed's stages 1 and 2: a second bucket is filled while one is reduced. None: not, which is DeepSpeed's default there."""
    prefetch_numel: int = 0
    """DeepSpeed's stage 3: parameters are gathered so many elements ahead (``stage3_prefetch_bucket_size``). 0: its default."""
    live_numel: int = 0
    """DeepSpeed's stage 3: gathered parameters stay where they are read again within so many elements
    (``stage3_max_reuse_distance``), and so many may be there at once (``stage3_max_live_parameters``). 0: its default."""
    kernels_off: tuple[str, ...] = ()
    """CUDA kernels of the runtime that are switched off (names of ``estimator.ops.kernels.KERNELS``, or ``all``): plain
    torch works in their place. A CPU has none of them in any case."""

    def __post_init__(self) -> None:
        if type(self.zero_stage) is not int or self.zero_stage not in (0, 1, 2, 3):
            raise invalid("zero", self.zero_stage, "0, 1, 2 or 3")
        require_choice("offload", self.offload, get_args(Offload))
        require_choice("dtype", self.dtype, get_args(Dtype))
        require_choice("grad_dtype", self.grad_dtype, get_args(GradDtype))
        require_choice("master_dtype", self.master_dtype, get_args(StateDtype))
        require_choice("state_dtype", self.state_dtype, get_args(StateDtype))
        if self.dtype == "fp32":  # the same things, under one name
            for name, value in (("grad_dtype", "model"), ("master_dtype", "fp32"), ("state_dtype", "fp32")):
                object.__setattr__(self, name, value)
        check_precision(self)
        check_optimizer(self)
        require_choice("grad_compression", self.grad_compression, get_args(GradCompression))
        for field in ("tp", "pp", "cp", "ep", "bucket_bytes"):
            require_int(field, getattr(self, field))
        check_recompute(self)
        if not isinstance(self.sequence_parallel, bool):
            raise invalid("sequence_parallel", self.sequence_parallel, "true or false")
        if self.tp == 1:
            object.__setattr__(self, "sequence_parallel", True)  # there is nothing to split
        require_choice("cp_kind", self.cp_kind, get_args(ContextKind))
        if self.cp == 1:
            object.__setattr__(self, "cp_kind", "ulysses")
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
        check_pipeline(self)
        check_servers(self)
        check_expert_parallel(self)
        check_framework(self)
        if isinstance(self.kernels_off, str) or not isinstance(self.kernels_off, Iterable):
            raise invalid("kernels_off", self.kernels_off, "a list of names of kernels, or of the word all")
        for name in self.kernels_off:
            require_choice("kernels_off", name, ("all", *KERNELS))
        off = self.kernels_off if self.framework == "zerocast" else ("all",)  # others have none of them
        object.__setattr__(self, "kernels_off", tuple(sorted(set(off))))

    @property
    def bucket_numel(self) -> int:
        """Elements of which buckets are made, the last unit's included."""
        own = FRAMEWORKS[self.framework].bucket_numel
        return (
            own if own and self.bucket_bytes == DEFAULT_BUCKET_BYTES else self.bucket_bytes // DTYPE_BYTES[self.dtype]
        )

    @property
    def resident_numel(self) -> int:
        """``persistent_numel``, or the framework's default."""
        return self.persistent_numel or FRAMEWORKS[self.framework].persistent_numel

    @property
    def grads(self) -> Dtype:
        """Dtype of the gradients that are kept, reduced and stepped with."""
        return self.dtype if self.grad_dtype == "model" else "fp32"

    @property
    def has_servers(self) -> bool:
        return self.sync == "parameter_server"

    @property
    def step_grads(self) -> Dtype:
        """Dtype of the gradients that the optimizer reads: parameter servers add them up in fp32."""
        return "fp32" if self.has_servers else self.grads

    @property
    def masters(self) -> Dtype:
        """Dtype of the parameters that the optimizer steps."""
        return self.dtype if self.master_dtype == "model" else "fp32"

    @property
    def states(self) -> Dtype:
        """Dtype of the optimizer's states."""
        return self.dtype if self.state_dtype == "model" else "fp32"

    @property
    def freezes_variance(self) -> bool:
        """Whether Adam's second moment stays as it is when the warm-up of compression is over."""
        return self.compression_warmup_steps > 0 and self.optimizer in ("adamw", "adam")

    @property
    def compresses_momentum(self) -> bool:
        """Whether ranks exchange momentum: each must hold all of it, on its device."""
        return self.freezes_variance and self.zero_stage == 0 and not self.offload_optimizer

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
    def n_summands(self) -> int:
        """Ranks of which each rounds a part of a layer's result before the parts are added up: of products under ``tp``, of
        attention around a ring."""
        return self.tp * (self.cp if self.cp_kind == "ring" else 1)

    @property
    def model_parallel(self) -> int:
        """GPUs that hold one copy of the model."""
        return self.tp * self.pp * self.cp
