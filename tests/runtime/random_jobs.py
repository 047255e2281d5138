"""Random jobs of everything that a ``Strategy`` can say, each run by one of its ranks on tensors without data.

``python -m tests.runtime.random_jobs 0 500`` holds the jobs of these seeds against the forecast and names those that differ.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from dataclasses import replace
from typing import Any, NamedTuple

from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy
from estimator.job.patches import Patches
from estimator.memory.reader import StepMemory
from estimator.predict import lay_out, memory_of, traffic_of
from runtime.session import Measurement
from tests.runtime import encoders, experts, tiny
from tests.runtime.memory import MODELS, STATES, metered
from tests.runtime.test_experts_memory import MODELS as EXPERTS

SEQ_LEN = 64
_WIDE: dict[str, Any] = {
    "d_model": 128, "head_dim": 32, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 1024, "max_positions": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, ModelSpec]] = {
    "decoder": MODELS,
    "experts": EXPERTS,
    "encoder": {"bert": replace(encoders.BERT, **_WIDE, position_rows=64)},
    "encoder-decoder": {
        "t5": replace(encoders.T5, **_WIDE),
        "t5-gated": replace(encoders.T5_GATED, **_WIDE),
        "bart": replace(encoders.BART, **_WIDE, position_rows=66),
    },
    "vision": {
        "vit": replace(encoders.VIT, **{**_WIDE, "max_positions": 50}, d_ff=512, position_rows=50,
                       patches=Patches(image_size=62, patch_size=8))
    },
}  # fmt: skip
SHARE = {"decoder": 12, "experts": 8, "encoder": 1, "encoder-decoder": 2, "vision": 1}
"""How often a family is drawn: the more axes it has, the more often."""
SERVERS = {"sync": "parameter_server"}
AXES: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {}, {}, SERVERS, {**SERVERS, "n_servers": 3}, {**SERVERS, "staleness": 2}, {"tp": 2}, {"tp": 4},
    {"tp": 2, "sequence_parallel": False}, {"cp": 2}, {"cp": 4}, {"cp": 2, "cp_kind": "ring"}, {"cp": 4, "cp_kind": "ring"},
    {"tp": 2, "cp": 2}, {"ep": 2}, {"ep": 4}, {"tp": 2, "ep": 2}, {"cp": 2, "ep": 2}, {"tp": 2, "cp": 2, "cp_kind": "ring", "ep": 2},
)  # fmt: skip
PIPELINES: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {"pp": 2}, {"pp": 3}, {"pp": 2, "pp_schedule": "gpipe"}, {"pp": 4, "pp_schedule": "zero_bubble"},
    {"pp": 2, "pp_schedule": "zero_bubble"}, {"pp": 2, "virtual_pp": 2, "pp_schedule": "interleaved_1f1b"},
    {"pp": 3, "virtual_pp": 2, "pp_schedule": "interleaved_1f1b"}, {"pp": 3, "pp_layers": (1, 3, 2)},
)  # fmt: skip
GROUPS: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {}, {"shard_size": 2, "zero_stage": 2}, {"shard_size": 4, "zero_stage": 3}, {"secondary_shard": 2, "zero_stage": 3},
    {"quantized_weights": True, "zero_stage": 3}, {"quantized_weights": True, "secondary_shard": 2, "zero_stage": 3},
    {"quantized_grads": 2, "zero_stage": 2}, {"quantized_grads": 2, "zero_stage": 3}, {"grad_compression": "one_bit"},
    {"grad_compression": "adacomp"}, {"grad_compression": "one_bit", "compression_warmup_steps": 1, "grad_clip": 0.0},
    {"sparse_embeddings": True},
)  # fmt: skip
OFFLOADS: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {}, {"offload": "optimizer"}, {"offload": "optimizer", "offload_fraction": 0.3},
    {"offload": "optimizer", "delayed_update": True}, {"offload": "optimizer,param"}, {"offload": "optimizer:nvme"},
)  # fmt: skip
RECOMPUTES: tuple[dict[str, Any], ...] = (
    {}, {}, {}, {"recompute": "full"}, {"recompute": "selective"}, {"recompute": "full", "activation_offload": True},
    {"recompute": "selective", "activation_offload": True}, {"recompute": "full", "activation_offload": True, "recompute_every": 2},
    *({"recompute": parts} for parts in ("activation,norms", "attention", "core_attention", "mlp", "attention,mlp,norms", "activation")),
    *({"recompute": how, "recompute_every": k} for how, k in (("full", 2), ("selective", 3), ("attention,norms", 2))),
)  # fmt: skip
CHOICES: dict[str, tuple[Any, ...]] = {
    "zero_stage": (0, 1, 1, 2, 2, 3, 3, 3),
    "dtype": ("bf16", "bf16", "bf16", "fp32", "fp16"),
    "grad_dtype": ("model", "model", "fp32"),
    "master_dtype": ("fp32", "fp32", "model"),
    "state_dtype": ("fp32", "fp32", "model"),
    "optimizer": ("adamw", "adamw", "adam", "sgd", "lion", "adagrad", "adamw8bit"),
    "attention": ("flash", "flash", "flash", "flash", "flash", "flash", "efficient", "math", "eager"),
    "bucket_bytes": (1, 50_000, 300_000, 1_000_000, 64 << 20),
    "persistent_numel": (0, 0, 200, 20_000),
    "prefetch_depth": (0, 1, 1, 2, 5),
    "grad_clip": (0.0, 1.0),
    "kernels_off": ((), (), (), ("all",), ("rms_norm", "layer_norm"), ("linear_cross_entropy",), ("adam", "grad_norm"),
                    ("linear_cross_entropy", "cross_entropy"), ("activation", "gated_activation"), ("rotary",)),
}  # fmt: skip
"""Values that change nothing, or refuse much, are in it several times, or once among many."""
TABLES = (OFFLOADS, RECOMPUTES, *(tuple({name: value} for value in values) for name, values in CHOICES.items()))
DATA_RANKS = (1, 2, 3, 4, 8, 12, 64, 512)
ARCHITECTURES = ("hopper", "hopper", "hopper", "hopper", "ampere", "blackwell", "volta", "cdna3", "cpu")
MOST_RANKS = 4096


class Draw(NamedTuple):
    """A job, and the rank of it that runs."""

    job: Job
    rank: int


def draw(seed: int) -> Draw:
    """The job of ``seed``: what ranks do together is drawn first, then one field after another is set where it goes with all before."""
    chance = random.Random(f"job {seed}")
    family = chance.choices(list(SHARE), list(SHARE.values()))[0]
    axes = chance.choice([a for a in AXES if family == "experts" or "ep" not in a])
    axes = axes if family in ("decoder", "experts") or "sync" in axes else {}
    while True:
        try:
            job = _begun(chance, family, axes)
            if seed % 2 and job.model.name == EXPERTS["biased"].name:
                job = with_windows(job)
            break
        except InputError:
            continue
    for table in chance.sample(TABLES, len(TABLES)):
        try:
            job = _runs(replace(job, strategy=replace(job.strategy, **chance.choice(table))))
        except InputError:
            continue
    rank = chance.randrange(job.cluster.n_gpus)
    if job.strategy.cp_kind == "ring":  # the forecast is the last one's, which attends to most
        rank += (job.strategy.cp - 1 - job.mesh.place("cp", rank)) * job.strategy.tp
    if job.model.vocab_size % job.strategy.tp:  # ... and the first one's, which has no smaller part of the vocabulary
        rank -= job.mesh.place("tp", rank)
    return Draw(job, rank)


def _begun(chance: random.Random, family: str, axes: dict[str, Any]) -> Job:
    strategy = Strategy(**{**chance.choice(GROUPS), **chance.choice(PIPELINES), **axes})
    n_data = chance.choice([n for n in DATA_RANKS if n * strategy.model_parallel <= MOST_RANKS])
    return tiny.job(
        _spec(chance, family, strategy), strategy, world=n_data * strategy.model_parallel,
        n_micro_batches=chance.choice((1, 2, 3, 4, 6)), micro_batch=chance.choice((1, 2, 3, 4)),
        seq_len=50 if family == "vision" else chance.choice((SEQ_LEN, 48, 24)), arch=chance.choice(ARCHITECTURES),
    )  # fmt: skip


def with_windows(job: Job) -> Job:
    """``job`` with GPT-OSS's attention and activation. Raises ``InputError``."""
    experts_of = job.model.experts
    assert experts_of is not None
    spec = replace(
        job.model, name=experts.GPT_OSS.name, attn_sinks=True, sliding_window=20, global_every=2,
        experts=replace(experts_of, clamp=7.0),
    )  # fmt: skip
    return _runs(replace(job, model=spec))


def _runs(job: Job) -> Job:
    """``job``; what the runtime refuses of windows and sinks raises ``InputError`` here."""
    s, on_gpu = job.strategy, job.cluster.gpu.arch != "cpu"
    if job.model.attn_sinks and (s.attention != "flash" or s.cp_kind == "ring" or (s.dtype == "fp32" and on_gpu)):
        raise InputError("no kernel")
    return job


def _spec(chance: random.Random, family: str, strategy: Strategy) -> ModelSpec:
    """A model of ``family`` of odd sizes, with as many blocks as a pipeline needs."""
    spec = chance.choice(list(FAMILIES[family].values()))
    more: dict[str, Any] = {"vocab_size": chance.choice((1024, 1000, 777)), "tied_embeddings": chance.random() < 0.4}
    if family == "vision":
        more = {"vocab_size": more["vocab_size"]}
    more["n_layers"] = sum(strategy.pp_layers) or max(chance.choice((1, 2, 3, 5)), strategy.pp * strategy.virtual_pp)
    if spec.experts is None:
        more["d_ff"] = chance.choice((512, 344, 300))
    elif chance.random() < 0.5:
        more["experts"] = replace(spec.experts, capacity_factor=chance.choice((0.0, 1.0, 1.25)))
    if spec.latent is None and family in ("decoder", "experts"):
        more["n_kv_heads"] = chance.choice((spec.n_kv_heads, 4))
    return replace(spec, **more)


def says(draw: Draw) -> str:
    """What is not at its default."""
    job, default = draw.job, Strategy()
    differs = [
        f"{f.name}={getattr(job.strategy, f.name)!r}"
        for f in dataclasses.fields(Strategy)
        if getattr(job.strategy, f.name) != getattr(default, f.name)
    ]
    w, spec = job.workload, job.model
    return (
        f"{spec.name} {spec.n_layers} layers, rank {draw.rank} of {job.cluster.n_gpus} {job.cluster.gpu.arch}, {job.n_micro_batches} x "
        f"{w.micro_batch_size} x {w.seq_len}, {', '.join(differs)}"
    )


class Found(NamedTuple):
    measured: Measurement
    forecast: StepMemory
    traffic: tuple[dict[str, int], dict[str, int], dict[str, int]]
    """As forecast: bytes and calls of collectives, bytes of copies."""


def run(draw: Draw) -> Found:
    job, rank = draw
    got = metered(job, "fake-cpu" if job.cluster.gpu.arch == "cpu" else "meta", rank)
    is_server = job.mesh.data_place(rank) < job.strategy.n_servers
    blueprint = lay_out(job, job.mesh.place("pp", rank), is_server=is_server)
    return Found(got, memory_of(blueprint), traffic_of(blueprint.program, blueprint.costs))


def check(draw: Draw) -> None:
    """Live bytes of every category, collectives and copies are the forecast's."""
    assert not difference(draw), says(draw)


SCALARS_BYTES = 256
"""What the forecast leaves out: numbers that operators hand around one by one, loss scales and seeds."""


def is_near(want: int, got: int, share: float) -> bool:
    return abs(want - got) <= max(share * got, SCALARS_BYTES)


def is_as_forecast(got: Measurement, want: StepMemory) -> bool:
    """States to the byte, the peak within 0.1% and where it is said to be (unless another place has as much), categories and phases
    within 1%."""
    assert got.peak_allocated_bytes is not None
    held, found = want.category_peak_bytes, got.category_peak_bytes
    phases = want.phase_peak_bytes, got.phase_peak_bytes
    return (
        all(held.get(name, 0) == found.get(name, 0) for name in STATES)
        and want.host_peak_bytes == got.host_bytes
        and is_near(want.peak_bytes, got.peak_allocated_bytes, 1e-3)
        and all(is_near(held.get(name, 0), found.get(name, 0), 1e-2) for name in ("activations", "logits_loss"))
        and phases[0].keys() == phases[1].keys()
        and all(is_near(phases[0][name], n_bytes, 1e-2) for name, n_bytes in phases[1].items())
        and (want.peak_where == got.peak_where or is_near(phases[0][got.peak_phase or ""], want.peak_bytes, 0))
    )


def difference(draw: Draw) -> str:
    """What is not as forecast; empty where all is."""
    try:
        got, want, traffic = run(draw)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if is_as_forecast(got, want) and (got.collective_bytes, got.collective_calls, got.copy_bytes) == traffic:
        return ""
    peak = got.peak_allocated_bytes or 1
    lines = [
        f"peak {want.peak_bytes / peak - 1:+.2%} {want.peak_where!r} for {got.peak_where!r}, {want.host_peak_bytes} for {got.host_bytes}"
    ]
    for name in sorted({*want.category_peak_bytes, *got.category_peak_bytes}):
        held, found = want.category_peak_bytes.get(name, 0), got.category_peak_bytes.get(name, 0)
        lines += [f"{name} {held} for {found}"] if held != found else []
    for name in sorted({*want.phase_peak_bytes, *got.phase_peak_bytes}):
        held, found = want.phase_peak_bytes.get(name, 0), got.phase_peak_bytes.get(name, 0)
        lines += [f"in {name} {held} for {found}"] if held != found else []
    for is_of, forecast in zip((got.collective_bytes, got.collective_calls, got.copy_bytes), traffic, strict=True):
        lines += [f"{forecast} for {is_of}"] if is_of != forecast else []
    return "; ".join(lines)


if __name__ == "__main__":
    first, last = (int(word) for word in sys.argv[1:3])
    found = 0
    for number in range(first, last):
        if why := difference(draw(number)):
            found += 1
            sys.stdout.write(f"{number}: {says(draw(number))}\n    {why}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{last - first} jobs, {found} differ\n")
