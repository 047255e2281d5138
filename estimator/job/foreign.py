"""Configuration files of other programs, told by their keys: what a refusal calls them, and what to give instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_KEYS: dict[str, tuple[frozenset[str], str]] = {
    "a DeepSpeed configuration": (
        frozenset((
            "zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps", "fp16", "bf16",
            "gradient_clipping", "steps_per_print", "zero_allow_untested_optimizer", "wall_clock_breakdown",
        )),
        "its settings as flags, e.g. --framework deepspeed --zero 2 --micro-batch 4",
    ),
    "an Accelerate configuration": (
        frozenset(("compute_environment", "distributed_type", "fsdp_config", "deepspeed_config", "num_processes")),
        "its settings as flags, e.g. --framework fsdp2 --zero 3 --gpus 8",
    ),
    "a torchtitan configuration": (
        frozenset(("parallelism", "training", "profiling", "metrics", "lr_scheduler", "activation_checkpoint", "job", "experimental")),
        "its settings as flags, e.g. --framework fsdp2 --zero 3 --tp 8",
    ),
    "a Hugging Face model config": (
        frozenset(("model_type", "architectures", "transformers_version", "torch_dtype", "num_hidden_layers", "hidden_size")),
        "that file with --model, or a job file that names it under [model] config",
    ),
}  # fmt: skip
"""Top-level keys of each, two of which tell it (DeepSpeed's first alone does)."""


def foreign(data: Mapping[str, Any]) -> tuple[str, str] | None:
    """What ``data`` is a configuration of, and what is allowed instead; ``None`` where nothing tells."""
    for what, (keys, instead) in _KEYS.items():
        if len(keys & data.keys()) >= 2 or "zero_optimization" in keys & data.keys():
            return what, instead
    return None
