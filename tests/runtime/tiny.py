"""Small models and jobs for the runtime's tests."""

from __future__ import annotations

from estimator.job import Cluster, Gpu, Host, Job, ModelSpec, Strategy, Workload

GPT = ModelSpec(
    name="tiny-gpt", family="gpt2", n_layers=2, d_model=32, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=128,
    vocab_size=61, max_positions=16, positions="learned", position_rows=16, norm="layernorm", norm_bias=True,
    activation="gelu_tanh", gated_mlp=False, qkv_bias=True, attn_out_bias=True, mlp_bias=True, tied_embeddings=True,
)  # fmt: skip
LLAMA = ModelSpec(
    name="tiny-llama", family="llama", n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=84,
    vocab_size=61, max_positions=16,
)  # fmt: skip
QWEN3 = ModelSpec(
    name="tiny-qwen3", family="qwen3", n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=24, d_ff=84,
    vocab_size=61, max_positions=16, qk_norm=True, tied_embeddings=True,
)  # fmt: skip
NEOX = ModelSpec(
    name="tiny-neox", family="gpt_neox", n_layers=2, d_model=32, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=128,
    vocab_size=61, max_positions=16, rotary_fraction=0.25, norm="layernorm", norm_bias=True, activation="gelu",
    gated_mlp=False, qkv_bias=True, attn_out_bias=True, mlp_bias=True, parallel_residual=True,
)  # fmt: skip
GEMMA2 = ModelSpec(
    name="tiny-gemma2", family="gemma2", n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, head_dim=24, d_ff=84,
    vocab_size=61, max_positions=16, activation="gelu_tanh", sandwich_norms=True, tied_embeddings=True,
)  # fmt: skip
ALL = (GPT, LLAMA, QWEN3, NEOX, GEMMA2)

HOST = Host(memory_bytes=1 << 40, n_cores=64, memory_bytes_per_s=1e11)


def gpu(arch: str = "hopper") -> Gpu:
    return Gpu(
        name=f"test-{arch}", arch=arch, memory_bytes=80 << 30, memory_bytes_per_s=3e12,
        peak_flops={"bf16": 1e15, "fp16": 1e15, "fp32": 6e13}, n_sms=132, l2_bytes=50 << 20,
        link_bytes_per_s=4e11, host_link_bytes_per_s=6e10,
    )  # fmt: skip


def job(
    model: ModelSpec, strategy: Strategy, *, world: int = 1, n_micro_batches: int = 1, micro_batch: int = 2,
    seq_len: int = 16, arch: str = "hopper",
) -> Job:  # fmt: skip
    cluster = Cluster(gpu=gpu(arch), n_gpus=world, gpus_per_node=min(world, 8), internode_bytes_per_s=5e10, host=HOST)
    workload = Workload(
        seq_len=seq_len,
        micro_batch_size=micro_batch,
        global_batch_size=micro_batch * (world // strategy.model_parallel) * n_micro_batches,
    )
    return Job(model=model, workload=workload, strategy=strategy, cluster=cluster)
