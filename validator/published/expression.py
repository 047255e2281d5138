"""A published run as a ``Job``, or the reason why it cannot be one."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from estimator import catalog
from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy, Workload
from estimator.job.experts import Experts
from estimator.memory.allocator_settings import AllocatorSettings
from validator.published.runs import PublishedRun

_GPUS = {
    "a100_40gb": "a100-40", "a100_80gb": "a100-80", "h100_sxm_80gb": "h100-sxm", "h100_96gb_hbm2e_500w": "h100-96",
    "h100_pcie_80gb": "h100-pcie", "h100_nvl_94gb": "h100-pcie-94", "h800": "h800", "h20": "h20", "gh200": "gh200", "h200": "h200",
    "h200_sxm": "h200", "h200_sxm_141gb": "h200", "b200": "b200", "b200_power_limited": "b200-750w", "b300": "b300",
    "gb200": "gb200", "gb300": "gb300", "v100_16gb": "v100-16", "v100_32gb": "v100-32", "v100_sxm2_16gb": "v100-16",
    "v100_sxm2_32gb": "v100-32", "v100_sxm3_32gb": "v100-sxm3-32", "v100": "v100-32", "a10g": "a10g", "l4": "l4", "l40s": "l40s",
    "rtx_3090": "rtx-3090", "rtx_4090": "rtx-4090", "rtx_5090": "rtx-5090", "mi250x": "mi250x", "mi300x": "mi300x",
    "mi325x": "mi325x", "mi355x": "mi355x",
}  # fmt: skip
"""Of the catalogue; V100s whose memory is not published are taken as those with 32 GB."""
_FRAMEWORKS = (
    ("llm-foundry", "composer"), ("composer", "composer"), ("torchtitan", "fsdp2"), ("fsdp2", "fsdp2"), ("megatron-deepspeed", "deepspeed"),
    ("deepspeed", "deepspeed"), ("megatron-bridge", "megatron_bridge"), ("nemo", "megatron_bridge"), ("megatron", "megatron"), ("fsdp", "fsdp1"), ("ddp", "fsdp1"),
    ("hf trainer", "fsdp1"), ("accelerate", "fsdp1"), ("lightning", "fsdp1"),
)  # fmt: skip
"""By a word of the published name, the first that it has; plain DDP is FSDP1's NO_SHARD."""
_OFFLOAD = {"none": "none", "optimizer_cpu": "optimizer", "optimizer_param_cpu": "optimizer,param"}
_OPTIMIZERS = {"adamw (decoupled)": "adamw"}
_GRAD_FUSION, _TORCH_2_1, _COMPOSER_0_16_4 = "2022-01-01", "2023-10-04", "2023-10-11"
"""Since when Megatron-LM's products add gradients to where they are kept (about), torch's checkpoint stops early, and Composer reduces
gradients in fp32. The first is about when, from memory; the others are days of release, the change in each from memory."""
_ROOT_APART = "2025-10-18"
"""Since when torchtitan gathers embedding and head by themselves: its wheel 0.2.0 was made then and does, that of 0.1.0 (2025-06-18) does not."""
_FLASH = ("flash", "sdpa", "unknown", None)


def job_of(run: PublishedRun) -> Job:
    """``run`` as the framework that it names trains it.

    A decoder without gated MLP is taken as MPT or GPT (LayerNorm, biases, learned positions), one with as the model of the catalogue
    that has its widths, else as Llama. Where nothing was published of sequence parallelism or gradients' dtype, the usual is
    taken; of the micro-batch, one sequence; of recomputation, none. Raises ``InputError`` with the reason for what cannot be
    expressed.
    """
    _refuse(run)
    model = _model(run)
    network = run.number("internode_gbps_per_gpu")
    gpu = run.text("gpu")
    assert gpu is not None
    cluster = catalog.cluster(_GPUS[gpu], run.whole("n_gpus"), run.whole_or("gpus_per_node", 8), network)
    micro_batch, grad_accum = run.whole_or("micro_batch_size", 1), run.whole_or("grad_accum", 0)
    strategy = _strategy(run)
    dp = cluster.n_gpus // strategy.model_parallel
    global_batch = run.whole_or("global_batch_size", micro_batch * grad_accum * dp)
    return Job(
        model=model,
        workload=Workload(seq_len=run.whole("seq_len"), micro_batch_size=micro_batch, global_batch_size=global_batch),
        strategy=strategy,
        cluster=cluster,
    )


def framework_of(run: PublishedRun) -> str:
    """Whose step it was. Raises ``InputError`` for a framework without a profile."""
    name = run.text("framework")
    for word, framework in _FRAMEWORKS:
        if word in (name or "").lower():
            return framework
    raise InputError(f"framework is {name!r}; known: {', '.join(word for word, _ in _FRAMEWORKS)}")


def allocator_of(run: PublishedRun) -> AllocatorSettings:
    """How the run's allocator was set, as far as is known: torchtitan's ``run_train.sh`` asks for expandable segments."""
    return AllocatorSettings(expandable_segments=framework_of(run) == "fsdp2")


def _refuse(run: PublishedRun) -> None:
    gpu = run.text("gpu")
    if gpu not in _GPUS:
        raise InputError(f"gpu is {gpu!r}; known: {', '.join(_GPUS)}")
    dtype = run.text("compute_dtype")
    if dtype not in ("bf16", "fp16", "fp32", "fp8"):
        raise InputError(f"compute_dtype is {dtype!r}; forecast: bf16, fp16, fp32, fp8")
    if run.text("attention") not in (*_FLASH, "eager"):
        raise InputError(f"attention is {run.text('attention')!r}; forecast: flash, sdpa, eager")
    if "lora" in f"{run.run_id} {run.text('model')}".lower():
        raise InputError("LoRA: which parameters are frozen is not in the columns")
    if run.flag("act_offload"):
        raise InputError("act_offload: how it was done was not published")
    offload = run.text("offload")
    if offload is not None and offload not in _OFFLOAD:
        raise InputError(f"offload is {offload!r}; forecast: {', '.join(_OFFLOAD)}")
    if run.text("act_checkpointing") not in ("none", "selective", "full", None):
        raise InputError(f"act_checkpointing is {run.text('act_checkpointing')!r}; forecast: none, selective, full")


def _model(run: PublishedRun) -> ModelSpec:
    n_heads, seq_len, d_model = run.whole("n_heads"), run.whole("seq_len"), run.whole("d_model")
    n_layers, vocab_size, name = run.whole("n_layers"), run.whole("vocab_size"), run.text("model") or "published"
    experts = None
    if run.number("n_experts"):
        experts = Experts(
            n_experts=run.whole("n_experts"), per_token=run.whole("experts_per_token"), d_ff=run.whole("expert_d_ff")
        )
    n_kv_heads = run.whole_or("n_kv_heads", n_heads)
    known = _known(d_model, n_heads, None if experts is None else experts.n_experts) if run.flag("gated_mlp") else None
    if known is not None and (known.n_kv_heads == n_kv_heads or known.latent is not None):
        tied = run.flag("tied_embeddings")
        return replace(
            known, name=name, n_layers=n_layers, vocab_size=vocab_size, max_positions=max(known.max_positions, seq_len),
            tied_embeddings=known.tied_embeddings if tied is None else tied, d_ff=run.whole_or("d_ff", known.d_ff),
        )  # fmt: skip
    if name.lower().startswith("deepseek"):
        raise InputError(
            f"model is {name!r}, whose latent attention is not in the columns, nor is a model of its widths known"
        )
    plain: dict[str, Any] = {
        "positions": "learned", "position_rows": seq_len, "norm": "layernorm", "norm_bias": True, "activation": "gelu",
        "gated_mlp": False, "qkv_bias": True, "attn_out_bias": True, "mlp_bias": True,
    }  # fmt: skip
    d_ff = run.whole_or("d_ff", experts.d_ff if experts is not None else 4 * d_model)
    return ModelSpec(
        name=name, family="custom", n_layers=n_layers, d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_dim=d_model // n_heads, d_ff=d_ff, vocab_size=vocab_size, max_positions=seq_len,
        tied_embeddings=bool(run.flag("tied_embeddings")), experts=experts, **({} if run.flag("gated_mlp") else plain),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _known(d_model: int, n_heads: int, n_experts: int | None) -> ModelSpec | None:
    """The decoder of the catalogue with these widths: of experts their head width and latent attention are not in the columns."""
    for name in catalog.model_names():
        spec = catalog.model(name)
        experts = None if spec.experts is None else spec.experts.n_experts
        if (
            (spec.d_model, spec.n_heads, experts) == (d_model, n_heads, n_experts)
            and spec.encoder is None
            and spec.gated_mlp
        ):
            return spec
    return None


def _strategy(run: PublishedRun) -> Strategy:
    tp, dtype, framework = run.whole_or("tp", 1), run.text("compute_dtype"), framework_of(run)
    virtual_pp = run.whole_or("virtual_pp", 1)
    schedule = run.text("pp_schedule") or ("interleaved_1f1b" if virtual_pp > 1 else "1f1b")
    sequence = run.flag("sequence_parallel")
    optimizer = run.text("optimizer") or "adamw"
    recompute = run.text("act_checkpointing") or "none"
    if recompute == "selective" and framework.startswith("megatron"):
        recompute = "core_attention"
    return Strategy(
        framework=framework,  # type: ignore[arg-type]
        zero_stage=run.whole("zero_stage"),
        offload=_OFFLOAD[run.text("offload") or "none"],  # type: ignore[arg-type]
        recompute=recompute,
        dtype="bf16" if dtype == "fp8" else dtype,  # type: ignore[arg-type]
        matmul_dtype="fp8" if dtype == "fp8" else "model",
        grad_fusion=framework != "megatron" or (run.text("date") or _GRAD_FUSION) >= _GRAD_FUSION,
        whole_recompute=framework in ("composer", "fsdp1") and (run.text("date") or _TORCH_2_1) < _TORCH_2_1,
        attention="eager" if run.text("attention") == "eager" else "flash",
        compile=bool(run.flag("torch_compile")),
        compile_loss=framework == "fsdp2" and bool(run.flag("torch_compile")) and (run.text("date") or "") >= "2025",
        root_apart=framework == "fsdp2" and (run.text("date") or "") >= _ROOT_APART,
        grad_dtype=_grad_dtype(run, framework),  # type: ignore[arg-type]
        optimizer=_OPTIMIZERS.get(optimizer, optimizer),  # type: ignore[arg-type]
        tp=tp,
        sequence_parallel=True if sequence is None else sequence,
        pp=run.whole_or("pp", 1),
        pp_schedule=schedule,  # type: ignore[arg-type]
        virtual_pp=virtual_pp,
        cp=run.whole_or("cp", 1),
        cp_kind="ulysses" if "cp_comm_type=a2a" in (run.text("notes") or "") else "ring",
        ep=run.whole_or("ep", 1),
    )


def _grad_dtype(run: PublishedRun, framework: str) -> str:
    """Where it was not published, what the framework did on the row's date; a mixed-precision default before that is the model's."""
    published = run.text("grad_reduce_dtype")
    if published is None and framework == "composer" and (run.text("date") or "") >= _COMPOSER_0_16_4:
        return "fp32" if run.text("compute_dtype") != "fp32" else "model"
    return "fp32" if published == "fp32" else "model"
