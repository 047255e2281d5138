"""Whose training step a job is: this project's runtime, or another framework's, each a profile of structural facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from estimator.errors import InputError, invalid, require_choice

if TYPE_CHECKING:
    from estimator.job.strategy import Strategy

Framework = Literal["zerocast", "fsdp1", "fsdp2", "deepspeed", "megatron"]
AttentionKernel = Literal["flash", "efficient", "math", "eager"]
MatmulDtype = Literal["model", "fp8"]


@dataclass(frozen=True, kw_only=True)
class FrameworkProfile:
    """What a framework's step has that others have not. Facts of its code, each with its source."""

    name: str
    title: str


FRAMEWORKS: dict[str, FrameworkProfile] = {
    "zerocast": FrameworkProfile(name="zerocast", title="Zerocast's runtime"),
    "fsdp1": FrameworkProfile(name="fsdp1", title="PyTorch FSDP1 (FullyShardedDataParallel)"),
    "fsdp2": FrameworkProfile(name="fsdp2", title="PyTorch FSDP2 (fully_shard)"),
    "deepspeed": FrameworkProfile(name="deepspeed", title="DeepSpeed"),
    "megatron": FrameworkProfile(name="megatron", title="Megatron-LM"),
}


def check_framework(s: Strategy) -> None:
    """Raises ``InputError``."""
    require_choice("framework", s.framework, get_args(Framework))
    require_choice("attention", s.attention, get_args(AttentionKernel))
    require_choice("matmul_dtype", s.matmul_dtype, get_args(MatmulDtype))
    if not isinstance(s.compile, bool):
        raise invalid("compile", s.compile, "true or false")
    if s.framework == "zerocast" and s.compile:
        raise InputError(
            "compile is true with framework zerocast, which is not compiled; allowed: false, or another framework"
        )
