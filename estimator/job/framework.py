"""Whose training step a job is: this project's runtime, or another framework's, each a profile of structural facts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from estimator.errors import InputError, invalid, require_choice, require_int

if TYPE_CHECKING:
    from estimator.job.strategy import Strategy

Framework = Literal["zerocast", "fsdp1", "composer", "fsdp2", "deepspeed", "megatron", "megatron_bridge"]
AttentionKernel = Literal["flash", "efficient", "math", "eager"]
MatmulDtype = Literal["model", "fp8"]
LossKernel = Literal["plain", "kernel", "in_place", "fp32_in_place"]
"""Cross-entropy where no kernel of this project's works. ``plain``: of an fp32 copy of the logits, whose log-probabilities are kept.
``kernel``: one kernel reads the logits, keeps them, and makes their gradient of them. ``in_place``: the kernel writes the gradient over the logits, of which there are no others. ``fp32_in_place``: the fp32 copy becomes
its softmax, and that its gradient."""
Fp8Linear = Literal["torchao", "te"]
"""Linear layers in fp8 (``estimator.ops.products``): torchao's ``Float8Linear``, or Transformer Engine's."""
ParamGrads = Literal["added", "kept", "fused"]
"""What becomes of a parameter's gradient when autograd has made it. ``added``: it is added to a buffer and dropped. ``kept``: it is
the gradient, until all of its unit are there. ``fused``: products with the weights' inputs add to the buffer themselves."""


@dataclass(frozen=True, kw_only=True)
class FrameworkProfile:
    """What a framework's step has that others have not. Facts of its code, each with its source.

    Read, and the programs held against runs of it: FSDP 1 and 2 of the installed torch, DeepSpeed 0.19.8. Read: megatron-core 0.14,
    llm-foundry 0.22 and Composer 0.32 (loss, metrics, joined projections), torchtitan 0.1, 0.2 and 0.3 (units of FSDP, fp8 and MXFP8
    linear layers), torchao 0.18. Transformer Engine's facts are from what these call and from memory; of Megatron-Bridge only what megatron-core has.
    """

    name: str
    title: str
    stages: tuple[int, ...] = (0, 1, 2, 3)
    """ZeRO stages that it has."""
    stages_are: str = ""
    """What it calls them."""
    units: Literal["groups", "flat", "rows"] = "groups"
    """What is gathered and reduced together. ``groups``: whole units, put together to a bucket where they need not come and go.
    ``flat``: each block as one flat tensor, all other parameters as one more, the *root*. ``rows``: the same units, of which every
    parameter is cut into rows by itself, so that they are copied into and out of what is sent."""
    param_grads: ParamGrads = "added"
    lasting_grads: bool = False
    """Buffers of gradients live from step to step."""
    bucket_numel: int = 0
    """Gradients are copied into buckets of so many elements, from which they are reduced (stages 1 to 3). 0: each group has a buffer."""
    sub_group_numel: int = 0
    """Stage 3: elements of a rank's shards that are stepped at a time."""
    persistent_numel: int = 0
    """Where parameters come and go: what ``Strategy.persistent_numel`` is when it is 0."""
    prefetch_numel: int = 0
    """The same of ``Strategy.prefetch_numel``."""
    live_numel: int = 0
    """The same of ``Strategy.live_numel``."""
    own_masters: bool = False
    """What is stepped is a copy also where the model is in fp32 already."""
    dummy_grads: bool = False
    """Where products add to the buffers themselves, autograd is given a tensor in place of each weight's gradient: one for all
    weights of a shape, for good."""
    joins_projections: bool = False
    """Queries, keys and values are one weight, and so are a gated MLP's two."""
    vocab_multiple: int = 0
    """Embedding and output layer have a multiple of so many rows on every tensor-parallel rank; 0: as many as the vocabulary."""
    gather_buffer: bool = False
    """With sequence parallelism the output layer's gathered input has a buffer for good."""
    workspace_bytes: int = 0
    """What its libraries hold on GPUs of Hopper's generation and later, beside PyTorch's own."""
    loss: LossKernel = "plain"
    logit_metrics: int = 0
    """Cross-entropies of all logits that are computed beside the loss, as metrics."""
    drops_out: bool = False
    """With ``eager`` attention: a tenth of the scores' softmax and of what is added to the residual stream is dropped, as the default
    arguments say (with flash attention, which came later, it is taken to be switched off)."""
    early_stop: bool = True
    """What is recomputed ends with the last tensor that backward needs (torch's checkpoint without reentrance); False: all of it runs."""
    fused_softmax: bool = False
    """``eager`` attention scales, masks and takes the softmax in one kernel, in the activations' dtype."""
    fused_norm: bool = True
    """RMSNorm is one kernel that keeps its input; False: written out in fp32, which keeps an fp32 copy of it and what is normalised."""
    fused_activation: bool = True
    """``activation(gate) * up`` is one kernel that keeps both; False: two, of which the second keeps the first one's result too."""
    fused_rotary: bool = True
    """Rotation by position is one kernel; False: written out."""
    sends_rows_once: bool = False
    """Tokens go once to each node that has experts of theirs."""
    pads_values: bool = True
    """Latent attention's values are filled up to the width of keys, as flash attention wants; False: its kernel takes two widths."""
    weights_in_experts: bool = False
    """A router's weights multiply inside of the experts, at their activation, instead of their results."""
    lean_kernels: bool = False
    """Norms and activations that are one kernel need nothing beside what they read and write, forward and backward."""
    fp8: Fp8Linear = "torchao"


FRAMEWORKS: dict[str, FrameworkProfile] = {
    "zerocast": FrameworkProfile(name="zerocast", title="Zerocast's runtime"),
    "fsdp1": FrameworkProfile(
        name="fsdp1",
        title="PyTorch FSDP1 (FullyShardedDataParallel)",
        stages=(0, 2, 3),
        stages_are="NO_SHARD, SHARD_GRAD_OP, FULL_SHARD",
        fused_norm=False,  # transformers/models/llama/modeling_llama.py: LlamaRMSNorm
        fused_activation=False,  # LlamaMLP: act_fn(gate_proj(x)) * up_proj(x)
        fused_rotary=False,  # apply_rotary_pos_emb
        units="flat",  # torch/distributed/fsdp/_flat_param.py: FlatParamHandle
        param_grads="kept",
    ),
    "composer": FrameworkProfile(
        name="composer",
        title="Composer (llm-foundry) on FSDP1",
        stages=(0, 2, 3),
        stages_are="NO_SHARD, SHARD_GRAD_OP, FULL_SHARD",
        units="flat",
        param_grads="kept",
        joins_projections=True,  # llmfoundry/models/layers/attention.py: Wqkv
        loss="kernel",  # llmfoundry/models/mpt/modeling_mpt.py: loss_fn fused_crossentropy, the default
        # llmfoundry/metrics/__init__.py: DEFAULT_CAUSAL_LM_TRAIN_METRICS; composer/metrics/nlp.py: LanguageCrossEntropy, which
        # LanguagePerplexity is too (0.22 also has TokenAccuracy, which reads the logits once)
        logit_metrics=2,
        fp8="te",  # composer/trainer/trainer.py: precision amp_fp8
    ),
    "fsdp2": FrameworkProfile(
        name="fsdp2",
        title="PyTorch FSDP2 (fully_shard)",
        stages=(0, 2, 3),
        stages_are="replicate, reshard_after_forward=False, reshard_after_forward=True",
        fused_norm=False,  # LlamaRMSNorm of transformers; torch.nn.RMSNorm before torch 2.8
        fused_activation=False,  # torchtitan/models/llama3/model.py: FeedForward
        fused_rotary=False,  # apply_rotary_emb
        units="rows",  # torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py: foreach_all_gather, foreach_reduce
        param_grads="kept",  # _fsdp_param_group.py: post_backward
    ),
    "deepspeed": FrameworkProfile(
        name="deepspeed",
        title="DeepSpeed",
        # deepspeed/runtime/zero/config.py: defaults of reduce_bucket_size, stage3_param_persistence_threshold,
        # stage3_prefetch_bucket_size, stage3_max_live_parameters and stage3_max_reuse_distance
        bucket_numel=500_000_000,
        sub_group_numel=1_000_000_000,
        persistent_numel=100_000,
        prefetch_numel=50_000_000,
        live_numel=1_000_000_000,
        own_masters=True,  # deepspeed/runtime/zero/stage3.py: fp32_partitioned_groups_flat; stage_1_and_2.py: single_partition_of_fp32_groups
        early_stop=False,  # deepspeed/runtime/activation_checkpointing/checkpointing.py: CheckpointFunction
        fused_norm=False,  # trains models of transformers, as above
        fused_activation=False,
        fused_rotary=False,
    ),
    "megatron": FrameworkProfile(
        name="megatron",
        title="Megatron-LM",
        stages=(0, 1),
        stages_are="without and with the distributed optimizer",
        # megatron/core/tensor_parallel/layers.py: LinearWithGradAccumulationAndAsyncCommunication, gradient_accumulation_fusion
        param_grads="fused",
        lasting_grads=True,  # megatron/core/distributed/param_and_grad_buffer.py: _ParamAndGradBuffer
        dummy_grads=True,  # transformer_engine/pytorch/module/base.py: get_dummy_wgrad; used by layers.py for the output layer too
        joins_projections=True,  # megatron/core/transformer/attention.py: linear_qkv; mlp.py: linear_fc1
        vocab_multiple=128,  # megatron/training/tokenizer: make_vocab_size_divisible_by
        gather_buffer=True,  # megatron/core/utils.py: GlobalMemoryBuffer, "mpu"
        workspace_bytes=32 << 20,  # transformer_engine/pytorch/module/base.py: get_cublas_workspace_size_bytes
        pads_values=False,  # cuDNN's attention in Transformer Engine
        weights_in_experts=True,  # megatron/core/transformer/moe/experts.py: weighted_bias_swiglu_impl
        lean_kernels=True,  # Transformer Engine's norms; megatron/core/fusions/fused_bias_swiglu.py, compiled by jit_fuser
        loss="in_place",  # transformer_engine/common/triton/cross_entropy.py: cross_entropy_kernel
        drops_out=True,  # megatron/training/arguments.py: --attention-dropout, --hidden-dropout
        early_stop=False,  # megatron/core/tensor_parallel/random.py: CheckpointFunction
        fused_softmax=True,  # megatron/core/fusions/fused_softmax.py: scaled_upper_triang_masked_softmax
        fp8="te",  # transformer_engine/pytorch/module/linear.py
    ),
}

FRAMEWORKS["megatron_bridge"] = replace(
    FRAMEWORKS["megatron"],
    name="megatron_bridge",
    title="Megatron-Bridge's performance recipes",
    sends_rows_once=True,  # megatron/core/transformer/moe/fused_a2a.py: DeepEP and HybridEP
)


def check_framework(s: Strategy) -> None:
    """Raises ``InputError``."""
    require_choice("framework", s.framework, get_args(Framework))
    require_choice("attention", s.attention, get_args(AttentionKernel))
    require_choice("matmul_dtype", s.matmul_dtype, get_args(MatmulDtype))
    for field in ("compile", "compile_loss", "root_apart", "whole_recompute", "grad_fusion"):
        if not isinstance(getattr(s, field), bool):
            raise invalid(field, getattr(s, field), "true or false")
    profile = FRAMEWORKS[s.framework]
    if s.zero_stage not in profile.stages:
        allowed = ", ".join(map(str, profile.stages))
        raise InputError(
            f"zero is {s.zero_stage} with framework {s.framework}; allowed: {allowed} ({profile.stages_are}), or another framework"
        )
    if s.whole_recompute and (s.framework == "zerocast" or not profile.early_stop):
        when = "never" if s.framework == "zerocast" else "always"
        others = ", ".join(name for name, p in FRAMEWORKS.items() if p.early_stop and name != "zerocast")
        raise InputError(
            f"whole_recompute is true with framework {s.framework}, which {when} does so; allowed: false, or framework {others}"
        )
    if not s.grad_fusion and profile.param_grads != "fused":
        raise InputError(
            f"grad_fusion is false with framework {s.framework}, of whose products it says nothing; allowed: true, or a framework of Megatron"
        )
    _check_fields(s)
    if s.root_apart and profile.units != "rows":
        raise InputError(f"root_apart is true with framework {s.framework}; allowed: false, or framework fsdp2")
    if s.framework == "zerocast" and (s.compile or s.compile_loss):
        raise InputError(
            f"{'compile' if s.compile else 'compile_loss'} is true with framework zerocast, which is not compiled; allowed: false, or another framework"
        )


_OWN = {
    "quantized_weights": False, "quantized_grads": 0, "secondary_shard": 0, "grad_compression": "none", "sparse_embeddings": False,
    "sync": "allreduce", "delayed_update": False, "offload_fraction": 1.0, "activation_offload": False, "persistent_numel": 0,
    "offload": "none",
}  # fmt: skip
"""Fields that say something of this project's runtime, with the value that says nothing."""
_OF_DEEPSPEED = (
    "quantized_weights", "quantized_grads", "secondary_shard", "grad_compression", "sparse_embeddings", "delayed_update",
    "offload_fraction", "activation_offload", "persistent_numel", "offload",
)  # fmt: skip
_SHARED_WITH = {"deepspeed": _OF_DEEPSPEED}
"""Those that other frameworks have too, as far as they are forecast."""


def _check_fields(s: Strategy) -> None:
    """Refuses what only this project's runtime has, or is forecast of it alone."""
    for field in ("prefetch_numel", "live_numel"):
        require_int(field, getattr(s, field), minimum=0)
    if s.overlap_comm is not None and not isinstance(s.overlap_comm, bool):
        raise invalid("overlap_comm", s.overlap_comm, "true or false")
    profile = FRAMEWORKS[s.framework]
    for field in ("overlap_comm", "prefetch_numel", "live_numel"):
        if getattr(s, field) and not profile.bucket_numel:
            raise InputError(
                f"{field} is {getattr(s, field)!r} with framework {s.framework}; allowed: only with framework deepspeed"
            )
    if s.framework == "zerocast":
        return
    for field, usual in _OWN.items():
        value = getattr(s, field)
        if value != usual and field not in _SHARED_WITH.get(s.framework, ()):
            raise InputError(
                f"{field} is {value!r} with framework {s.framework}, of which it is not forecast; allowed: {usual!r}, or another framework"
            )
    if s.pp > 1 and (profile.units == "flat" or (profile.units == "rows" and s.pp_schedule == "zero_bubble")):
        raise InputError(
            f"pp is {s.pp} and pp_schedule {s.pp_schedule!r} with framework {s.framework}, whose pipelines are not forecast; allowed: pp 1, "
            "or another framework"
        )
    if s.master_dtype == "model" and s.framework.startswith("megatron"):
        raise InputError(
            f"master_dtype is 'model' with framework {s.framework}, which steps fp32 masters; allowed: 'fp32'"
        )
