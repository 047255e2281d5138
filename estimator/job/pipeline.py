"""What a ``Strategy`` may say of a pipeline, and what a model and a batch allow of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from estimator.errors import InputError, invalid, require_choice, require_int

if TYPE_CHECKING:
    from estimator.job.model import ModelSpec
    from estimator.job.strategy import Strategy

PipelineSchedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "zero_bubble"]


def stage_sizes(text: str) -> tuple[int, ...]:
    """The numbers in ``text``, which commas separate. Raises ``InputError``."""
    try:
        return tuple(int(word) for word in text.split(",") if word.strip())
    except ValueError:
        raise invalid("pp_layers", text, "numbers of blocks, separated by commas") from None


def check_pipeline(s: Strategy) -> None:
    """Raises ``InputError`` for fields of ``s`` that do not go together."""
    require_choice("pp_schedule", s.pp_schedule, get_args(PipelineSchedule))
    require_int("virtual_pp", s.virtual_pp)
    if isinstance(s.pp_layers, str) or not isinstance(s.pp_layers, list | tuple):
        raise invalid("pp_layers", s.pp_layers, "a list of numbers of blocks")
    for n_blocks in s.pp_layers:
        require_int("pp_layers", n_blocks)
    object.__setattr__(s, "pp_layers", tuple(s.pp_layers))
    if s.pp == 1:
        if s.virtual_pp > 1 or s.pp_layers:
            field = "virtual_pp" if s.virtual_pp > 1 else "pp_layers"
            raise InputError(f"{field} is {getattr(s, field)} with pp 1; allowed: only with pp of at least 2")
        object.__setattr__(s, "pp_schedule", "1f1b")  # there is nothing to schedule
        return
    if s.pp_schedule == "interleaved_1f1b" and s.virtual_pp == 1:
        raise InputError(
            "pp_schedule is 'interleaved_1f1b' with virtual_pp 1; allowed: virtual_pp of at least 2, or '1f1b'"
        )
    if s.pp_schedule != "interleaved_1f1b" and s.virtual_pp > 1:
        raise InputError(
            f"virtual_pp is {s.virtual_pp} with pp_schedule {s.pp_schedule!r}; allowed: 1, or 'interleaved_1f1b'"
        )
    if s.pp_layers and len(s.pp_layers) != s.pp * s.virtual_pp:
        raise InputError(
            f"pp_layers has {len(s.pp_layers)} numbers; allowed: {s.pp * s.virtual_pp} = pp * virtual_pp, one for each stage"
        )
    if s.pp_schedule == "zero_bubble" and (s.zero_stage > 1 or s.offload_param):
        raise InputError(
            f"pp_schedule is 'zero_bubble' with zero {s.zero_stage} and offload {s.offload!r}; allowed: zero 0 or 1 without "
            "offloaded parameters, as the gradients of two micro-batches are made in turns"
        )
    used = {
        "offload": s.offload_nvme or s.delayed_update,
        "activation_offload": s.activation_offload,
        "sparse_embeddings": s.sparse_embeddings,
        "compression_warmup_steps": s.compression_warmup_steps > 0,
    }
    for name, is_used in used.items():
        if is_used:
            value = s.offload_words if name == "offload" else getattr(s, name)
            raise InputError(f"pp is {s.pp} with {name} {value!r}; allowed: one of the two")


def check_stages(model: ModelSpec, s: Strategy, n_micro_batches: int) -> None:
    """Raises ``InputError`` where ``model`` cannot be cut, or ``n_micro_batches`` not be scheduled, as ``s`` says."""
    if s.pp == 1:
        return
    n_stages = s.pp * s.virtual_pp
    if model.n_layers < n_stages:
        raise InputError(
            f"pp * virtual_pp is {s.pp} * {s.virtual_pp} = {n_stages}; allowed: at most the {model.n_layers} blocks of {model.name}"
        )
    if s.pp_layers and sum(s.pp_layers) != model.n_layers:
        raise InputError(
            f"pp_layers adds up to {sum(s.pp_layers)}; allowed: to the {model.n_layers} blocks of {model.name}"
        )
    if s.virtual_pp > 1 and n_micro_batches % s.pp:
        near = max(1, round(n_micro_batches / s.pp)) * s.pp
        raise InputError(
            f"the step has {n_micro_batches} micro-batches with pp_schedule 'interleaved_1f1b' and pp {s.pp}; allowed: a multiple "
            f"of pp (global_batch / (micro_batch * data-parallel GPUs)), the nearest is {near}"
        )
