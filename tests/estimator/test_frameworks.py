"""Memory and programs of other frameworks' steps: hand-computed buffers, published peaks, refusals."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from estimator import catalog
from estimator.errors import InputError
from estimator.job import Job, ModelSpec, Strategy, Workload
from estimator.job.experts import Experts
from estimator.job.latent import LatentAttention
from estimator.predict import lay_out, lay_out_stages, memory_of
from estimator.schedule.events import Alloc, Collective, Free, StepProgram
from estimator.units import GIB
from tests.runtime import tiny

FRAMEWORKS = ("fsdp1", "composer", "fsdp2", "deepspeed", "megatron")
B200 = catalog.cluster("b200", 8, 8, None)


def program(framework: str, stage: int, *, world: int = 4, micro: int = 1, **more: Any) -> StepProgram:
    strategy = Strategy(zero_stage=stage, framework=framework, **more)  # type: ignore[arg-type]
    return lay_out(tiny.job(tiny.LLAMA, strategy, world=world, n_micro_batches=micro)).program


def calls(step: StepProgram) -> Counter[str]:
    return Counter(
        event.op
        for section in step.step
        for _ in range(section.repeat)
        for event in section.events
        if isinstance(event, Collective) and event.purpose != "grad_norm"
    )


def buffers(step: StepProgram) -> dict[tuple[str, int], int]:
    events = (*step.init, *(event for section in step.step for event in section.events))
    return {(e.buffer.role, e.buffer.group): e.buffer.n_bytes for e in events if isinstance(e, Alloc)}


def test_fsdp_gathers_blocks_twice_where_they_are_resharded_and_the_root_once() -> None:
    for framework in ("fsdp1", "fsdp2"):
        assert calls(program(framework, 3)) == {"all_gather": 2 * 2 + 1, "reduce_scatter": 3}
        assert calls(program(framework, 2, micro=3)) == {"all_gather": 3 * 3, "reduce_scatter": 3 * 3}


def test_fsdp2_cuts_every_parameter_into_rows() -> None:
    held = buffers(program("fsdp2", 3, world=5, grad_dtype="fp32"))
    block, width = 2 * 32 + 32 * (32 + 16 + 16) + 32 * 32 + 3 * 84 * 32, 32
    # two norms of 32 elements (7 of a rank); q and out 32 rows (7), k and v 16 (4), gate and up 84 (17), down 32 rows of 84 (7)
    shard = 2 * 7 + (7 + 4 + 4 + 7) * width + 2 * 17 * width + 7 * 84
    blocks = 1
    assert held["kept_params", blocks] == 4 * shard
    assert held["cast_shard", blocks] == 2 * shard
    assert held["gathered", blocks] == held["full_params", blocks] == 2 * 5 * shard
    assert held["full_grads", blocks] == 4 * 5 * shard
    assert 5 * shard > block
    root = 2 * 13 * width + 7  # embedding and head of 61 rows, the last norm
    assert held["kept_params", 0] == 4 * root


def test_fsdp1_has_one_flat_tensor_for_each_block_and_one_for_the_rest() -> None:
    held = buffers(program("fsdp1", 3, grad_dtype="fp32"))
    block = 2 * 32 + 32 * (32 + 16 + 16) + 32 * 32 + 3 * 84 * 32
    assert held["full_params", 1] == held["flat_grads", 1] == 2 * block
    assert held["full_grads", 1] == 4 * block
    assert held["kept_params", 1] == held["grad_shard", 1] == block
    assert held["full_params", 0] == 2 * (2 * 61 * 32 + 32)
    assert ("gathered", 1) not in held


def test_low_precision_exists_only_while_a_unit_is_gathered() -> None:
    for framework in ("fsdp1", "fsdp2"):
        strategy = Strategy(zero_stage=3, framework=framework)  # type: ignore[arg-type]
        memory = memory_of(lay_out(tiny.job(tiny.LLAMA, strategy, world=4)))
        assert "master_params" not in memory.category_peak_bytes
        between = memory.phase_category_bytes["init"]
        assert between["optimizer_state"] == 2 * between["params"]


def test_megatron_keeps_gradients_from_step_to_step() -> None:
    held = program("megatron", 1, grad_dtype="fp32")
    roles = {event.buffer.role for event in held.init if isinstance(event, Alloc)}
    assert {"full_params", "full_grads", "master"} <= roles
    assert calls(held) == {"reduce_scatter": 1, "all_gather": 1}


def decoder(n_layers: int) -> ModelSpec:
    return ModelSpec(
        name="llama3-70b-cut", family="llama", n_layers=n_layers, d_model=8192, n_heads=64, n_kv_heads=8, head_dim=128,
        d_ff=28672, vocab_size=128256, max_positions=32768,
    )  # fmt: skip


DEEPSEEK = ModelSpec(
    name="deepseek-v2-cut", family="deepseek_v2", n_layers=4, d_model=5120, n_heads=128, n_kv_heads=128, head_dim=192, d_ff=12288,
    vocab_size=102400, max_positions=4096,
    experts=Experts(n_experts=160, per_token=6, d_ff=1536, shared_d_ff=3072, first_layer=1, capacity_factor=1.0),
    latent=LatentAttention(kv_rank=512, q_rank=1536, nope_head_dim=128, rope_head_dim=64, value_head_dim=128),
)  # fmt: skip


def megatron(model: ModelSpec, seq_len: int = 4096, **parallel: int) -> Job:
    strategy = Strategy(zero_stage=1, grad_dtype="fp32", optimizer="adam", framework="megatron", **parallel)  # type: ignore[arg-type]
    dp = 8 // strategy.model_parallel
    workload = Workload(seq_len=seq_len, micro_batch_size=1, global_batch_size=4 * dp)
    return Job(model=model, workload=workload, strategy=strategy, cluster=B200)


PUBLISHED = [
    (megatron(decoder(12), pp=2), 66.55),
    (megatron(decoder(12), tp=2), 60.68),
    (megatron(decoder(12), tp=4), 39.07),
    (megatron(decoder(12), tp=8), 28.29),
    (megatron(decoder(12), 32768, tp=2, cp=4), 68.43),
    (megatron(decoder(12), 32768, cp=8), 104.51),
    (megatron(DEEPSEEK, ep=8), 45.63),
    (megatron(DEEPSEEK, ep=4, pp=2), 44.70),
]
"""``max_memory_allocated`` in GiB of the rank with most of it: github.com/MooreThreads/SimuMax, docs/b200/b200_release_v1.2_summary.md
(Megatron-LM core 0.14, Transformer Engine 2.11)."""


@pytest.mark.parametrize("job, gib", PUBLISHED)
def test_published_peaks_of_megatron(job: Job, gib: float) -> None:
    peak = max(memory_of(blueprint).peak_bytes for blueprint in lay_out_stages(job))
    assert peak / GIB == pytest.approx(gib, rel=0.01)


def test_what_transformer_engine_and_megatron_hold_for_good() -> None:
    tables = {b.role: b.n_bytes for b in lay_out(megatron(decoder(12), tp=2)).tables}
    weights = 10240 * 8192 + 8192 * 8192 + 57344 * 8192 + 28672 * 8192 + 128256 * 8192
    assert tables["dummy_grads"] == 2 * weights // 2
    assert tables["gather_buffer"] == 4096 * 8192 * 2
    assert tables["library_workspace"] == 32 << 20


def test_deepspeed_fills_buckets_of_fixed_size() -> None:
    one, two = (buffers(program("deepspeed", 2, overlap_comm=overlap)) for overlap in (False, True))
    assert one["bucket_0", -1] == 2 * 500_000_000
    assert ("bucket_1", -1) not in one
    assert two["bucket_1", -1] == 2 * 500_000_000
    own = buffers(program("deepspeed", 2, bucket_bytes=1 << 20))
    assert own["bucket_0", -1] == 1 << 20
    lasting = {e.buffer.role for e in program("deepspeed", 3, persistent_numel=1).init if isinstance(e, Alloc)}
    assert {"bucket_0", "grad_shard", "kept_params", "master"} <= lasting


def test_a_deepspeed_step_makes_a_flat_gradient_and_an_fp32_one() -> None:
    step = program("deepspeed", 2)
    held, shard = buffers(step), sum(n for (role, _), n in buffers(step).items() if role == "master") // 4
    assert held["flat_grads", -1] == 2 * shard
    assert held["wide_grads", -1] == 4 * shard


def test_deepspeed_keeps_what_is_read_again_soon() -> None:
    model = tiny.LLAMA
    numel = 2 * 32 + 32 * (32 + 16 + 16) + 32 * 32 + 3 * 84 * 32
    few, many = (
        calls(program("deepspeed", 3, world=2, persistent_numel=1, live_numel=live, prefetch_numel=numel))
        for live in (1, 1_000_000_000)
    )
    assert few["all_gather"] > many["all_gather"] == model.n_layers + 2


STAGES = {"deepspeed": (0, 1, 2, 3), "megatron": (0, 1)}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_what_is_made_is_dropped(framework: str) -> None:
    for stage, world, micro, again, grads in itertools.product(
        STAGES.get(framework, (0, 2, 3)), (1, 4), (1, 3), ("none", "full"), ("model", "fp32")
    ):
        step = program(framework, stage, world=world, micro=micro, recompute=again, grad_dtype=grads)
        live: Counter[tuple[str, int]] = Counter()
        for section in step.step:
            for event in (event for _ in range(section.repeat) for event in section.events):
                if isinstance(event, Alloc | Free) and event.buffer.role != "written_grads":  # operators make those
                    key = event.buffer.role, event.buffer.group
                    live[key] += 1 if isinstance(event, Alloc) else -1
                    assert live[key] in (0, 1), (key, stage, world, micro)
        assert not any(live.values()), (stage, world, micro)


def test_fsdp2_in_a_pipeline_gathers_and_reduces_a_unit_once_per_step() -> None:
    model = replace(tiny.LLAMA, n_layers=4)
    strategy = Strategy(zero_stage=3, framework="fsdp2", pp=2, grad_dtype="fp32")
    first, last = lay_out_stages(tiny.job(model, strategy, world=8, n_micro_batches=6))
    for blueprint in (first, last):
        assert calls(blueprint.program) == {"all_gather": 3, "reduce_scatter": 3}
        twice = blueprint.program._replace(step=blueprint.program.step * 2)
        assert memory_of(blueprint).peak_bytes == memory_of(replace(blueprint, program=twice)).peak_bytes
    kept = memory_of(first).category_bytes_at_peak["grads"]
    assert kept == 4 * sum(unit.numel for unit in first.layout.units)  # of all passes, whole, in fp32


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_step_leaves_the_device_as_it_found_it(framework: str) -> None:
    for stage in STAGES.get(framework, (0, 2, 3)):
        strategy = Strategy(zero_stage=stage, framework=framework, recompute="full")  # type: ignore[arg-type]
        blueprint = lay_out(tiny.job(tiny.QWEN3, strategy, world=4, n_micro_batches=3))
        twice = blueprint.program._replace(step=blueprint.program.step * 2)
        assert memory_of(blueprint).peak_bytes == memory_of(replace(blueprint, program=twice)).peak_bytes


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"framework": "megatron", "zero_stage": 3}, "zero is 3 with framework megatron; allowed: 0, 1"),
        ({"framework": "fsdp2", "zero_stage": 1}, "allowed: 0, 2, 3 (replicate, reshard_after_forward=False"),
        ({"framework": "fsdp1", "zero_stage": 3, "pp": 2}, "pp is 2 and pp_schedule '1f1b' with framework fsdp1"),
        (
            {"framework": "fsdp2", "zero_stage": 3, "offload": "optimizer"},
            "offload is 'optimizer' with framework fsdp2",
        ),
        ({"framework": "megatron", "zero_stage": 1, "sync": "parameter_server"}, "sync is 'parameter_server'"),
        ({"overlap_comm": True, "zero_stage": 2}, "overlap_comm is True with framework zerocast"),
        ({"framework": "fsdp2", "zero_stage": 3, "live_numel": 5}, "only with framework deepspeed"),
        ({"framework": "deepspeed", "live_numel": -1}, "live_numel is -1"),
        ({"framework": "fdsp2"}, "fsdp2"),
    ],
)
def test_what_a_framework_cannot_do_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        Strategy(**fields)
    assert words in str(error.value)
