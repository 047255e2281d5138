"""What other estimators say of a job, in their own published formulas: bytes of one GPU, and seconds of a step.

Each function takes a ``Job`` and gives ``None`` for what its tool cannot be asked. They are here to be compared with
(``bench_estimators.py``); nothing of the project reads them. Symbols are those of Korthikanti et al. 2022: ``s`` tokens of a
sequence, ``b`` micro-batch, ``h`` width, ``a`` heads, ``L`` layers, ``v`` vocabulary, ``t`` tensor-parallel GPUs.
"""

from __future__ import annotations

from collections import defaultdict
from math import ceil
from typing import NamedTuple

from estimator.job import Job
from estimator.sharding.units import count_params, model_units
from estimator.units import DTYPE_BYTES


class Symbols(NamedTuple):
    """The sizes in the formulas; ``s`` is a context-parallel GPU's part."""

    s: int
    b: int
    h: int
    a: int
    L: int
    v: int
    t: int


def symbols(job: Job) -> Symbols:
    m, w, st = job.model, job.workload, job.strategy
    return Symbols(w.seq_len // st.cp, w.micro_batch_size, m.d_model, m.n_heads, m.n_layers, m.vocab_size, st.tp)


def n_params(job: Job) -> int:
    """Parameters of the whole model, a tied table once."""
    return count_params(model_units(job.model))


def largest_module_numel(job: Job) -> int:
    """Parameters of the module with most of its own (no children's): ``sum(p.numel() for p in m.parameters(recurse=False))``."""
    sizes: dict[tuple[int, str], int] = defaultdict(int)
    for number, unit in enumerate(model_units(job.model)):
        for param in unit.params:
            sizes[number, param.name.rpartition(".")[0]] += param.numel
    return max(sizes.values())


# ---- memory ---------------------------------------------------------------------------------------------------------


def deepspeed(job: Job) -> float | None:
    """``estimate_zero2_model_states_mem_needs`` and ``estimate_zero3_model_states_mem_needs`` of DeepSpeed, bytes of a GPU.

    From https://deepspeed.readthedocs.io/en/latest/memory.html, whose examples (2,851M parameters, the largest layer 32M, 8 GPUs:
    15.93 and 5.31 GB under ZeRO-2, 6.09, 0.78 and 0.12 GB under ZeRO-3) these give. Newer sources of ZeRO-2 are said to charge
    ``2 + 18 / N`` bytes per parameter where the documented example has ``4 + 16 / N``; which release changed it was not checked.
    They count model states alone, and know neither ZeRO-1 nor tensor and pipeline parallelism.
    """
    st, gpus, params = job.strategy, job.cluster.n_gpus, n_params(job)
    if st.zero_stage < 2 or st.model_parallel > 1:
        return None
    if st.zero_stage == 2:
        return 2 * params if st.offload_optimizer else 4 * params + 16 * params / gpus
    largest_bytes = 4 * largest_module_numel(job)
    if st.offload_param:
        return largest_bytes
    return largest_bytes + (2 if st.offload_optimizer else 18) * params / gpus


def accelerate(job: Job, param_dtype: str) -> float:
    """The column "Training using Adam" of ``accelerate estimate-memory`` (``commands/estimate.py``, 1.15.0, ``estimate_training_usage``): four
    times the model in fp32, twice its fp32 size in 16 bits, which is four times the parameters' bytes either way.

    It counts one GPU without activations, whatever the batch and however many GPUs share the states.
    """
    return 4 * DTYPE_BYTES[param_dtype] * n_params(job)


def megatron(job: Job) -> float:
    """``report_theoretical_memory`` of Megatron-LM (``megatron/training/theoretical_memory_usage.py``): the first pipeline stage.

    Weights, gradients and states take 18 bytes per parameter, ``6 + 12 / dp`` with the distributed optimizer, which is as near as it
    comes to ZeRO-2 and 3. Activations are table 2 of Korthikanti et al. with ``18 + 4 d_ff / h`` for their 34. It reports these with
    sequence parallelism and selective recomputation alone (scores are not kept, nor are they by flash attention); for other jobs
    the paper's equations are taken: (2) without sequence parallelism, (4) with scores kept, ``2 s b h`` with full recomputation.
    Written from memory of the source of 2024, where experts multiply the MLP and are not divided by ``ep``.
    """
    m, st, (_, _, h, a, n_layers, _, t) = job.model, job.strategy, symbols(job)
    vocab = 128 * t * ceil(m.vocab_size / (128 * t))
    d_ff, n_experts = (m.d_ff, 1) if m.experts is None else (m.experts.d_ff, m.experts.n_experts)
    attention = (1 + m.n_kv_heads / a) * m.head_dim * a / h
    mlp = d_ff / h * n_experts * (1.5 if m.gated_mlp else 1)
    layers = 2 * n_layers * h * h * (attention + mlp + 2 / h + 1 / (n_layers * h))
    tables = vocab * h * (2 if not m.tied_embeddings and st.pp == 1 else 1)
    params = (layers / st.pp + tables) / t
    return params * (6 + 12 / job.mesh.n_data if job.zero_stage else 18) + _megatron_activations(job, d_ff, vocab)


def _megatron_activations(job: Job, d_ff: int, vocab: int) -> float:
    st, (s, b, h, _, n_layers, _, t) = job.strategy, symbols(job)
    layer: float
    if st.recompute == "full":
        layer = 2 * s * b * h * (t if not _splits_tokens(job) else 1)
    else:
        layer = s * b * h * (18 + 4 * d_ff / h + _scores(job))
        if not _splits_tokens(job):
            layer += 10 * s * b * h * (t - 1)
    n_bytes: float = n_layers * layer + 8 * s * b * st.pp + s * b * h * st.pp
    if st.virtual_pp > 1:
        n_bytes *= 1 + (st.pp - 1) / (st.pp * st.virtual_pp)
    elif st.pp > 1:
        n_bytes *= min(1, job.n_micro_batches / st.pp)
    if st.pp == 1:
        n_bytes += 4 * s * b * h * (1 + vocab / h)
    return n_bytes / t


def _splits_tokens(job: Job) -> bool:
    return job.strategy.tp == 1 or job.strategy.sequence_parallel


def _scores(job: Job) -> float:
    """``5 a s / h`` where the scores of attention are kept."""
    kept = job.strategy.attention in ("math", "eager") and job.strategy.recompute == "none"
    return 5 * job.model.n_heads * (job.workload.seq_len // job.strategy.cp) / job.model.d_model if kept else 0.0


def eleuther(job: Job) -> float:
    """The article "Transformer Math 101" (https://blog.eleuther.ai/transformer-math, Anthony et al. 2023), which their calculator computes.

    2 bytes per parameter of a 16-bit model, 12 of AdamW with fp32 copies, gradients in their own dtype; ZeRO divides states (1),
    gradients (2) and parameters (3) by the GPUs that share them; all three are divided by ``tp * pp``, too. (The article divides gradients by
    ``pp`` alone; whether the calculator does was not checked, and the kinder reading is taken.) Activations ``s b h L (10 + 24 / t + 5 a s / (h t))`` bytes, without the last term under selective recomputation, ``2 s b h L`` under
    full. Flash attention is taken as selective recomputation, as the article has no term for it. The calculator in their
    cookbook adds allowances (communication buffers, fragmentation) which the article does not have; they are left out.
    """
    st, params, (s, b, h, _, n_layers, _, t) = job.strategy, n_params(job), symbols(job)
    dp = job.mesh.n_data
    model = DTYPE_BYTES[st.dtype] * params / (t * st.pp) / (dp if job.zero_stage == 3 else 1)
    grads = DTYPE_BYTES[st.grads] * params / (t * st.pp) / (dp if job.zero_stage >= 2 else 1)
    states = 0.0 if st.offload_optimizer else 12 * params / (t * st.pp) / (dp if job.zero_stage else 1)
    if st.recompute == "full":
        return model + grads + states + 2 * s * b * h * n_layers
    return model + grads + states + s * b * h * n_layers * (10 + 24 / t + _scores(job) / t)


def llm_analysis(job: Job) -> float:
    """``LLMAnalysis.training`` of llm-analysis 0.2.2 with its defaults (fp32 norms, flash attention), bytes of a GPU.

    16-bit weights; optimizer states of 12 and gradients of 4 bytes per parameter, over the data-parallel GPUs from ZeRO-1, 2 and 3 (weights) on.
    It knows two matrices in an MLP; for a gated one ``d_ff`` is taken as half as large again, so that its parameters are right. Tables count
    once, as if tied. Pipelines hold ``L`` layers' activations whatever the schedule. Held against the package itself on five jobs: equal, but that it
    counts logits and the last norm twice where the micro-batch is one sequence, which is taken for a slip and is not done here.
    """
    m, st, (s, b, h, a, n_layers, v, t) = job.model, job.strategy, symbols(job)
    dp, stage = job.mesh.n_data, job.zero_stage
    experts, top, d_ff = (
        (1, 1, m.d_ff) if m.experts is None else (m.experts.n_experts, m.experts.per_token, m.experts.d_ff)
    )
    width = d_ff * (1.5 if m.gated_mlp else 1)
    attention = 2 * h * h + 2 * h * h * max(m.n_kv_heads, t) / a
    mlp = 2 * h * width * experts / st.ep
    router = h * experts if experts > 1 else 0
    share = dp / st.ep
    layer = {
        "weights": 2
        * ((attention + 2 * h) / (dp if stage == 3 else 1) + (mlp + router) / (share if stage == 3 else 1)),
        "states": 12 * ((attention + 2 * h + router) / (dp if stage else 1) + mlp / (share if stage else 1)),
        "grads": 4 * ((attention + 2 * h + router) / (dp if stage >= 2 else 1) + mlp / (share if stage >= 2 else 1)),
    }
    table = (v * h + h) * (2 / (dp if stage == 3 else 1) + 12 / (dp if stage else 1) + 4 / (dp if stage >= 2 else 1))
    model = (sum(layer.values()) * n_layers / st.pp + table) / t
    split = t if _splits_tokens(job) else 1
    tokens = s * b
    if st.recompute == "full":
        kept = 2 * tokens * h / t
    else:
        core = 0.0 if st.recompute != "none" else 2 * (2 * tokens * h + 4 * a * tokens) / t
        kept = 2 * tokens * h * (1 / split + 4 / t) + core + tokens * h / split
        kept += 2 * tokens * h * (experts / st.ep) * top * (1 / split + 2 * width / h / t) + 2 * 4 * tokens * h / split
    last_norm = 0.0 if st.recompute == "full" else 4 * tokens * h / split
    return model + n_layers * kept + 2 * v * tokens / t + last_norm


# ---- time -----------------------------------------------------------------------------------------------------------


def rule_flops(job: Job) -> float:
    """FLOPs of a step by the rule ``6 N D + 12 L d s^2`` (Kaplan et al. 2020; the second term, attention, for every sequence)."""
    w, m = job.workload, job.model
    tokens = w.global_batch_size * w.seq_len
    width = m.n_heads * m.head_dim
    return 6.0 * n_active_params(job) * tokens + 12.0 * m.n_layers * width * w.seq_len * tokens


def n_active_params(job: Job) -> int:
    """Parameters that a token passes: of experts those that it goes to."""
    e = job.model.experts
    if e is None:
        return n_params(job)
    unused = 0
    for unit in model_units(job.model):
        experts = sum(p.numel for p in unit.params if p.name.startswith("mlp.experts."))
        unused += experts * (e.n_experts - e.per_token) // e.n_experts
    return n_params(job) - unused


def rule_seconds(job: Job, constant: float) -> float | None:
    """``(6 N D + 12 L d s^2) / (GPUs x dense peak x constant)``; ``None`` where the GPU has no peak in the job's dtype."""
    dtype = "fp8" if job.strategy.matmul_dtype == "fp8" else job.strategy.dtype
    peak = job.cluster.gpu.peak_flops.get(dtype)
    return None if not peak else rule_flops(job) / (job.cluster.n_gpus * peak * constant)
