"""Colours of categories, parts and terms, the same in every chart."""

from __future__ import annotations

from dashboard.data import OUTSIDE

CATEGORY_COLOURS = {
    "params": "#1f4e8c", "gathered_params": "#5b8fd0", "offload_staging": "#a9c7ea",
    "grads": "#2a8c6a", "reduce_buckets": "#86cbb0",
    "master_params": "#6a4c9c", "optimizer_state": "#a48bcb",
    "activations": "#d9822b", "logits_loss": "#f0b35e", "temporaries": "#f6d9a8", "workspace": "#c9a26b",
    "cuda_context": "#7a7f87", "comm_buffers": "#a3a8b0", "fragmentation": "#cfd3d8", OUTSIDE: "#8d939b",
}  # fmt: skip
"""Parameters blue, gradients green, optimizer violet, activations orange, everything outside the tensors grey."""
PART_COLOURS = {
    "forward": "#1f4e8c", "backward": "#5b8fd0", "recompute": "#a9c7ea",
    "exposed_gather": "#d9822b", "exposed_reduce": "#f0b35e", "exposed_other_comm": "#f6d9a8",
    "optimizer": "#6a4c9c", "offload": "#c9534f", "pipeline_bubble": "#a3a8b0", "data": "#cfd3d8",
}  # fmt: skip
"""Compute blue, waiting orange and red."""

TERM_COLOURS = {
    "ideal": "#2a8c6a", "uneven": "#86cbb0", "matmul": "#1f4e8c", "attention": "#5b8fd0", "memory_bound": "#a9c7ea", "issue": "#c9a26b",
}  # fmt: skip
"""Terms of the waterfall that are no part of the step; what surrounds the program is grey."""


def term_colour(name: str) -> str:
    """Of a term of the waterfall."""
    return TERM_COLOURS.get(name) or PART_COLOURS.get(name) or "#a3a8b0"
