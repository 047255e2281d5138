"""What categories and parts are called in front of people."""

from __future__ import annotations

CATEGORY_LABELS = {
    "params": "parameters",
    "grads": "gradients",
    "master_params": "fp32 master parameters",
    "optimizer_state": "optimizer state",
    "activations": "activations",
    "logits_loss": "logits and loss",
    "gathered_params": "gathered parameters",
    "reduce_buckets": "gradient buckets",
    "offload_staging": "offload staging",
    "workspace": "workspace",
    "temporaries": "temporaries",
    "cuda_context": "CUDA context",
    "comm_buffers": "communication buffers",
    "fragmentation": "allocator overhead",
}
PART_LABELS = {
    "forward": "forward",
    "backward": "backward",
    "recompute": "recompute",
    "exposed_gather": "waiting for parameters",
    "exposed_reduce": "waiting for gradients",
    "exposed_other_comm": "waiting for other communication",
    "optimizer": "optimizer",
    "offload": "waiting for offload",
    "pipeline_bubble": "pipeline bubble",
    "data": "data",
}
