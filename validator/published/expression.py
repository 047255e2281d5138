"""A published run as a ``Job``, or the reason why it cannot be one."""

from __future__ import annotations

from typing import Any

from estimator import catalog
from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy, Workload
from estimator.job.experts import Experts
from validator.published.runs import PublishedRun

_GPUS = {
    "a100_40gb": "a100-40", "a100_80gb": "a100-80", "h100_sxm_80gb": "h100-sxm", "h100_pcie_80gb": "h100-pcie", "h200": "h200",
    "h200_sxm": "h200", "b200": "b200", "gb200": "gb200", "v100_16gb": "v100-16", "v100_32gb": "v100-32", "l40s": "l40s",
    "mi300x": "mi300x",
}  # fmt: skip
_OFFLOAD = {"none": "none", "optimizer_cpu": "optimizer", "optimizer_param_cpu": "optimizer,param"}
_OPTIMIZERS = {"adamw (decoupled)": "adamw", "adamw": "adamw", "adam": "adam", "sgd": "sgd"}
_FLASH = ("flash", "sdpa", "unknown", None)


def job_of(run: PublishedRun) -> Job:
    """``run`` as this project's runtime would train it, in plain torch: others have none of its kernels.

    A decoder without gated MLP is taken as MPT or GPT (LayerNorm, biases, learned positions), one with as Llama. Where
    nothing was published of sequence parallelism or gradients' dtype, the usual is taken. Raises ``InputError`` with the reason
    for what cannot be expressed.
    """
    _refuse(run)
    model = _model(run)
    network = run.number("internode_gbps_per_gpu")
    gpu = run.text("gpu")
    assert gpu is not None
    cluster = catalog.cluster(_GPUS[gpu], run.whole("n_gpus"), run.whole_or("gpus_per_node", 8), network)
    micro_batch, grad_accum = run.whole("micro_batch_size"), run.whole_or("grad_accum", 0)
    strategy = _strategy(run)
    dp = cluster.n_gpus // strategy.model_parallel
    global_batch = run.whole_or("global_batch_size", micro_batch * grad_accum * dp)
    return Job(
        model=model,
        workload=Workload(seq_len=run.whole("seq_len"), micro_batch_size=micro_batch, global_batch_size=global_batch),
        strategy=strategy,
        cluster=cluster,
    )


def _refuse(run: PublishedRun) -> None:
    gpu = run.text("gpu")
    if gpu not in _GPUS:
        raise InputError(f"gpu is {gpu!r}; known: {', '.join(_GPUS)}")
    dtype = run.text("compute_dtype")
    if dtype not in ("bf16", "fp16", "fp32"):
        raise InputError(f"compute_dtype is {dtype!r}; forecast: bf16, fp16, fp32")
    if run.text("attention") not in _FLASH:
        raise InputError(f"attention is {run.text('attention')!r}; forecast: flash attention")
    if run.flag("act_offload"):
        raise InputError("act_offload: how it was done was not published")
    for column, known in (("offload", _OFFLOAD), ("optimizer", _OPTIMIZERS)):
        value = run.text(column)
        if value is not None and value not in known:
            raise InputError(f"{column} is {value!r}; forecast: {', '.join(known)}")
    if run.text("act_checkpointing") not in ("none", "selective", "full"):
        raise InputError(f"act_checkpointing is {run.text('act_checkpointing')!r}; forecast: none, selective, full")
    if (run.text("family") or run.text("model") or "").lower().startswith("deepseek"):
        raise InputError(f"model is {run.text('model')!r}, whose latent attention is not in the columns")


def _model(run: PublishedRun) -> ModelSpec:
    n_heads, seq_len, d_model = run.whole("n_heads"), run.whole("seq_len"), run.whole("d_model")
    plain: dict[str, Any] = {
        "positions": "learned", "position_rows": seq_len, "norm": "layernorm", "norm_bias": True, "activation": "gelu",
        "gated_mlp": False, "qkv_bias": True, "attn_out_bias": True, "mlp_bias": True,
    }  # fmt: skip
    experts = None
    if run.number("n_experts"):
        experts = Experts(
            n_experts=run.whole("n_experts"), per_token=run.whole("experts_per_token"), d_ff=run.whole("expert_d_ff")
        )
    d_ff = run.whole_or("d_ff", experts.d_ff if experts is not None else 0)
    return ModelSpec(
        name=run.text("model") or "published", family="custom", n_layers=run.whole("n_layers"), d_model=d_model, n_heads=n_heads,
        n_kv_heads=run.whole_or("n_kv_heads", n_heads), head_dim=d_model // n_heads, d_ff=d_ff,
        vocab_size=run.whole("vocab_size"), max_positions=seq_len, tied_embeddings=bool(run.flag("tied_embeddings")),
        experts=experts, **({} if run.flag("gated_mlp") else plain),
    )  # fmt: skip


def _strategy(run: PublishedRun) -> Strategy:
    tp, dtype = run.whole_or("tp", 1), run.text("compute_dtype")
    virtual_pp = run.whole_or("virtual_pp", 1)
    schedule = run.text("pp_schedule") or ("interleaved_1f1b" if virtual_pp > 1 else "1f1b")
    sequence = run.flag("sequence_parallel")
    return Strategy(
        zero_stage=run.whole("zero_stage"),
        offload=_OFFLOAD[run.text("offload") or "none"],  # type: ignore[arg-type]
        recompute=run.text("act_checkpointing") or "none",
        dtype=dtype,  # type: ignore[arg-type]
        grad_dtype="fp32" if run.text("grad_reduce_dtype") == "fp32" else "model",
        optimizer=_OPTIMIZERS[run.text("optimizer") or "adamw"],  # type: ignore[arg-type]
        tp=tp,
        sequence_parallel=True if sequence is None else sequence,
        pp=run.whole_or("pp", 1),
        pp_schedule=schedule,  # type: ignore[arg-type]
        virtual_pp=virtual_pp,
        cp=run.whole_or("cp", 1),
        ep=run.whole_or("ep", 1),
        kernels_off=("all",),
    )
