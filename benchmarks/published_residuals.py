"""Measured over forecast seconds of published training runs: where ``estimator.time.interval.PUBLISHED_RUNS`` comes from.

    python benchmarks/published_residuals.py RUNS.csv

The file has one run per row: shape (``n_layers, d_model, n_heads, n_kv_heads, d_ff, gated_mlp, vocab_size, tied_embeddings``),
machine (``gpu, n_gpus, gpus_per_node, internode_gbps_per_gpu``), strategy (``zero_stage, tp, pp, cp, micro_batch_size,
global_batch_size, seq_len, compute_dtype, act_checkpointing, offload``) and ``step_time_s``. Shipped curves, nothing fitted;
without the kernels of this runtime, which those runs did not have.
A row that cannot be expressed is counted with its reason.
"""

from __future__ import annotations

import sys
from collections import Counter, defaultdict

import numpy as np
import pandas as pd

from estimator import catalog
from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy, Workload
from estimator.predict import predict

GPUS = {"a100_40gb": "a100-40", "a100_80gb": "a100-80", "h100_sxm_80gb": "h100-sxm"}
RECOMPUTE = ("none", "selective", "full")


def job_of(row: pd.Series) -> Job:
    """The row as a job; a decoder without gated MLP is taken as MPT or GPT (LayerNorm, biases, learned positions).

    Raises ``InputError`` with the reason for what cannot be expressed.
    """
    if row.gpu not in GPUS:
        raise InputError(f"gpu {row.gpu}")
    if row.compute_dtype != "bf16" or row.offload != "none" or row.act_checkpointing not in RECOMPUTE:
        raise InputError("other dtype, offload or recomputation")
    if any(row[axis] != 1 for axis in ("tp", "pp", "cp")) or row.zero_stage not in (2, 3) or pd.isna(row.step_time_s):
        raise InputError("not plain ZeRO-2/3 with a step time")
    n_heads, seq_len = int(row.n_heads), int(row.seq_len)
    plain = {
        "positions": "learned", "position_rows": seq_len, "norm": "layernorm", "norm_bias": True, "activation": "gelu",
        "gated_mlp": False, "qkv_bias": True, "attn_out_bias": True, "mlp_bias": True,
    }  # fmt: skip
    model = ModelSpec(
        name=str(row.model), family="custom", n_layers=int(row.n_layers), d_model=int(row.d_model), n_heads=n_heads,
        n_kv_heads=n_heads if pd.isna(row.n_kv_heads) else int(row.n_kv_heads), head_dim=int(row.d_model) // n_heads,
        d_ff=int(row.d_ff), vocab_size=int(row.vocab_size), max_positions=seq_len,
        tied_embeddings=bool(row.tied_embeddings), **({} if row.gated_mlp else plain),
    )  # fmt: skip
    network = None if pd.isna(row.internode_gbps_per_gpu) else float(row.internode_gbps_per_gpu)
    return Job(
        model=model,
        workload=Workload(
            seq_len=seq_len,
            micro_batch_size=int(row.micro_batch_size),
            global_batch_size=int(row.global_batch_size),
        ),
        strategy=Strategy(zero_stage=int(row.zero_stage), recompute=row.act_checkpointing, kernels_off=("all",)),
        cluster=catalog.cluster(GPUS[row.gpu], int(row.n_gpus), int(row.gpus_per_node), network),
    )


def main(path: str) -> None:
    ratios: dict[str, list[float]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for _, row in pd.read_csv(path, keep_default_na=True).iterrows():
        try:
            report = predict(job_of(row))
        except (InputError, ValueError) as error:  # ValueError: an empty field
            left_out[str(error)] += 1
            continue
        assert report.step_s is not None
        for key in ("all", f"{row.source}, {row.gpu}, ZeRO-{int(row.zero_stage)}"):
            ratios[key].append(row.step_time_s / report.step_s)
    print("measured / forecast         n    min     5%  median    95%    max")
    for key, values in sorted(ratios.items()):
        low, p05, median, p95, high = np.percentile(values, [0, 5, 50, 95, 100])
        print(f"{len(values):29d} {low:6.2f} {p05:6.2f} {median:7.2f} {p95:6.2f} {high:6.2f}  {key}")
    for reason, n in left_out.most_common():
        print(f"left out {n:4d}: {reason}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/published_residuals.py RUNS.csv")
    main(sys.argv[1])
