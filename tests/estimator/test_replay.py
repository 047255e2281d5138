"""A step's requests through the simulated allocator: the same live bytes as the reader adds up, and reserved ones by hand."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from estimator import catalog
from estimator.errors import InputError
from estimator.job import Job, Strategy
from estimator.job.framework import FRAMEWORKS
from estimator.job.options import JobOptions, build_job
from estimator.memory.allocator import CachingAllocator
from estimator.memory.allocator_settings import AllocatorSettings
from estimator.memory.device import device_memory
from estimator.memory.outside import communicators, outside_memory
from estimator.memory.replay import Subject, _Player, can_replay, replay
from estimator.memory.requests import REQUESTS, Requests
from estimator.predict import lay_out, lay_out_stages, memory_of, predict, subject_of
from estimator.report import StepReport
from estimator.schedule.events import Alloc, Buffer, Event, Free, Section, StepProgram, Update
from estimator.units import MIB
from tests.runtime import tiny

LLAMA = {"model": "llama-3-8b", "gpu": "h100-sxm", "gpus": 8, "global_batch": 32, "seq_len": 2048}
PIPELINE = {**LLAMA, "gpus": 16, "pp": 4, "global_batch": 64, "micro_batch": 1, "zero": 1}
JOBS: dict[str, dict[str, Any]] = {
    **{f"zero {stage}": {**LLAMA, "zero": stage} for stage in range(4)},
    **{f"recompute {how}": {**LLAMA, "zero": 3, "recompute": how} for how in ("selective", "full", "attention", "norms,activation")},
    "every third block": {**LLAMA, "zero": 2, "recompute": "full", "recompute_every": 3},
    "offload": {**LLAMA, "zero": 3, "offload": "optimizer,param"},
    "activation offload": {**LLAMA, "zero": 3, "recompute": "full", "activation_offload": True},
    "plain torch": {**LLAMA, "zero": 3, "kernels_off": "all"},
    "tied": {**LLAMA, "model": "gpt2", "seq_len": 512, "gpu": "a100-80"},
    "tensor parallel": {**LLAMA, "zero": 2, "tp": 2},
    "ring": {**LLAMA, "cp": 4, "cp_kind": "ring"},
    "experts": {**LLAMA, "model": "mixtral-8x7b", "gpus": 16, "ep": 8, "zero": 1},
    "encoder-decoder": {**LLAMA, "model": "t5-base", "seq_len": 512},
    "encoder-decoder again": {**LLAMA, "model": "t5-base", "seq_len": 512, "recompute": "full"},
    "1f1b": PIPELINE,
    "interleaved": {**PIPELINE, "pp_schedule": "interleaved_1f1b", "virtual_pp": 2},
    "gpipe": {**PIPELINE, "pp_schedule": "gpipe"},
    "zero bubble": {**PIPELINE, "pp_schedule": "zero_bubble"},
    "pipeline of shards": {**PIPELINE, "gpus": 16, "zero": 3, "recompute": "full"},
    "fsdp1": {**LLAMA, "framework": "fsdp1", "zero": 3, "recompute": "full"},
    "fsdp2": {**LLAMA, "framework": "fsdp2", "zero": 3, "recompute": "selective"},
    "deepspeed": {**LLAMA, "framework": "deepspeed", "zero": 3},
    "megatron": {**LLAMA, "framework": "megatron", "zero": 1, "tp": 4, "pp": 2},
}  # fmt: skip


def job(**options: Any) -> Job:
    return build_job(JobOptions(**options))


@pytest.mark.parametrize("name", JOBS)
def test_live_bytes_are_the_readers(name: str) -> None:
    for blueprint in lay_out_stages(job(**JOBS[name])):
        subject, memory = subject_of(blueprint), memory_of(blueprint)
        assert can_replay(subject.costs)
        player = _Player(subject, CachingAllocator())
        got = player.run()
        assert got.requested_bytes + subject.beyond_bytes == memory.peak_bytes
        assert got.requested_bytes <= got.allocated_bytes <= got.reserved_bytes and got.reserved_bytes % (2 * MIB) == 0
        lasting = memory.phase_category_bytes["init"]
        assert player.allocator.requested_bytes == sum(lasting.values()), "something outlives the step"


FIELDS: dict[str, tuple[Any, ...]] = {
    "zero_stage": (0, 1, 2, 3),
    "framework": ("zerocast", "zerocast", "zerocast", "fsdp1", "composer", "fsdp2", "deepspeed", "megatron"),
    "recompute": ("none", "selective", "full", "attention", "mlp", "norms", "norms,activation", "core_attention"),
    "recompute_every": (1, 1, 2),
    "offload": ("none", "none", "none", "optimizer", "optimizer,param"),
    "activation_offload": (False, False, True),
    "optimizer": ("adamw", "sgd", "adagrad"),
    "dtype": ("bf16", "fp16", "fp32"),
    "grad_dtype": ("model", "fp32"),
    "prefetch_depth": (0, 1, 2),
    "bucket_bytes": (1, 1 << 14, 1 << 25),
    "persistent_numel": (0, 64),
    "secondary_shard": (0, 0, 0, 2),
    "shard_size": (0, 0, 0, 2),
    "quantized_weights": (False, False, True),
    "grad_compression": ("none", "none", "one_bit"),
    "grad_clip": (0.0, 1.0),
    "tp": (1, 1, 2),
    "pp": (1, 1, 2),
    "cp": (1, 1, 2),
    "pp_schedule": ("1f1b", "gpipe", "zero_bubble"),
    "attention": ("flash", "flash", "math", "eager"),
    "compile": (False, False, True),
}


def test_live_bytes_are_the_readers_in_random_strategies() -> None:
    rng = random.Random(1)
    seen: Counter[str] = Counter()
    while seen.total() < 300:
        chosen = {name: rng.choice(values) if rng.random() < 0.5 else values[0] for name, values in FIELDS.items()}
        model = rng.choice((tiny.LLAMA, tiny.GPT))
        try:
            some = tiny.job(
                model, Strategy(**chosen), world=rng.choice((1, 4, 8)), n_micro_batches=rng.choice((1, 2, 5))
            )
            blueprints = lay_out_stages(some)
        except InputError:
            continue
        for blueprint in blueprints:
            subject = subject_of(blueprint)
            requested = replay(subject).requested_bytes + subject.beyond_bytes
            more = requested - memory_of(blueprint).peak_bytes
            # where a unit has two groups, a weight's and a bias's gradient, which are one tensor here, belong to both
            two_groups = FRAMEWORKS[some.strategy.framework].units != "groups" and some.strategy.tp > 1
            assert more == 0 or (two_groups and 0 < more <= 512), (chosen, some.cluster.n_gpus, some.n_micro_batches)
        seen[some.strategy.framework] += 1
    assert len(seen) >= 4, seen


@pytest.mark.parametrize("name", ["zero 2", "1f1b", "gpipe", "interleaved", "fsdp2"])
def test_turns_that_are_left_out_would_change_nothing(name: str) -> None:
    for blueprint in lay_out_stages(job(**JOBS[name]))[:2]:
        subject = subject_of(blueprint)._replace(requests=REQUESTS[JOBS[name].get("framework", "zerocast")])
        sections = [
            s._replace(events=s.events * s.repeat, repeat=1, passes=s.passes * s.repeat) for s in subject.program.step
        ]
        flat = subject._replace(program=subject.program._replace(step=tuple(sections)))
        assert replay(flat) == replay(subject)


# ---- small programs by hand -------------------------------------------------------------------------------------------


def buffer(role: str, mib: float, category: str = "temporaries") -> Buffer:
    return Buffer(role, 0, category, int(mib * MIB))


def subject(init: list[Event], step: list[Event], **fields: Any) -> Subject:
    blueprint = lay_out(job(**LLAMA))
    program = StepProgram(tuple(init), (Section("optimizer", tuple(step)),))
    return Subject(blueprint.layout, program, blueprint.costs, **fields)


A, B, C = buffer("a", 30), buffer("b", 11), buffer("c", 40)


def test_reserved_bytes_by_hand() -> None:
    got = replay(subject([Alloc(A)], [Alloc(B), Alloc(C), Free(B), Alloc(B._replace(role="d", n_bytes=12 * MIB)), Free(C),
                                      Free(B._replace(role="d"))]))  # fmt: skip
    # 30; 11 in a segment of 12, not split, as 1 MiB is left; 40; the 12 take the 11's place
    assert (got.reserved_bytes, got.allocated_bytes, got.requested_bytes) == (82 * MIB, 82 * MIB, 82 * MIB)
    assert (got.fragmentation_bytes, got.n_retries, got.is_out_of_memory) == (0, 0, False)
    other = replay(subject([Alloc(A)], [Alloc(B), Free(B), Alloc(C), Free(C)]))
    assert (other.reserved_bytes, other.fragmentation_bytes) == (82 * MIB, 12 * MIB)  # 11 and 40 never live together


def test_a_full_device() -> None:
    turns = subject([Alloc(A)], [Alloc(B), Free(B), Alloc(C), Free(C)])
    got = replay(turns, limit_bytes=81 * MIB)
    # the first step's 40 needs the 12 back; the second step cuts its 11 from the 40
    assert (got.reserved_bytes, got.n_retries, got.is_out_of_memory) == (70 * MIB, 0, False)
    assert replay(turns, limit_bytes=69 * MIB).is_out_of_memory
    both = subject([], [Alloc(A), Free(A), Alloc(C), Free(C)])
    assert replay(both, limit_bytes=69 * MIB).n_retries == 0  # the 30 is cut from the 40 from the second step on


def test_buffers_of_other_streams_have_pools_of_their_own() -> None:
    turns = [Alloc(A), Free(A), Alloc(C), Free(C), Alloc(A), Free(A)]
    assert replay(subject([], turns)).reserved_bytes == 70 * MIB
    apart = Requests(pools={"a": "gather"})
    # 11 is cut from the 40
    assert replay(subject([], [*turns, Alloc(B), Free(B)], requests=apart)).reserved_bytes == 70 * MIB
    shared = subject([], [Alloc(C), Free(C), Alloc(A), Free(A)])
    assert (
        replay(shared).reserved_bytes == 40 * MIB and replay(shared._replace(requests=apart)).reserved_bytes == 70 * MIB
    )


def test_what_another_stream_uses_is_missing_until_the_host_waits_for_it() -> None:
    turns = subject([], [Alloc(A), Free(A)] * 6)
    assert replay(turns).reserved_bytes == 30 * MIB
    waits = Requests(waiting=frozenset("a"), paced_by=frozenset("a"))
    # the first and the second are away when the third is asked for, before which the host waits for the first
    assert replay(turns._replace(requests=waits)).reserved_bytes == 60 * MIB


def test_late_states_find_what_the_first_step_has_left() -> None:
    state = buffer("optimizer_state_0", 40, "optimizer_state")
    turns = subject([Alloc(state)], [Alloc(C), Free(C), Update(0, 1, "compute")])
    early, late = replay(turns), replay(turns._replace(requests=Requests(late_states=True)))
    assert early.reserved_bytes == late.reserved_bytes == 80 * MIB
    # the first step's 40 becomes the state; the second step needs another
    player = _Player(turns._replace(requests=Requests(late_states=True)), CachingAllocator(limit_bytes=40 * MIB))
    assert player.run().is_out_of_memory and player.allocator.requested_bytes == 40 * MIB


def test_buffers_may_be_a_tensor_for_each_parameter() -> None:
    blueprint = lay_out(job(**{**LLAMA, "zero": 3}))
    group = blueprint.layout.groups[
        1
    ]  # a block: q and o 16 Mi elements each, k and v 4 Mi, gate, up, down 56 Mi, two norms of 4,096
    whole = Buffer("master", 1, "master_params", 2 * group.numel)
    program = StepProgram((Alloc(whole),), ())
    one = Subject(blueprint.layout, program, blueprint.costs)
    assert replay(one).reserved_bytes == (2 * group.numel + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
    player = _Player(one._replace(requests=Requests(by_param=frozenset(("master",)))), CachingAllocator())
    got = player.run()
    sizes = sorted(block.requested for block in player.live["buffer", "master", 1])
    assert sizes == [8192, 8192, *(n * MIB for n in (8, 8, 32, 32, 112, 112, 112))] and sum(sizes) == whole.n_bytes
    assert got.reserved_bytes == (2 + 20 + 2 * 32 + 3 * 112) * MIB  # two of 8 MiB share a segment of 20


def test_moved_parameters_leave_their_first_places_in_the_cache() -> None:
    blueprint = lay_out(job(**{**LLAMA, "zero": 3}))
    flat = Buffer("full_params", 1, "params", 2 * blueprint.layout.groups[1].numel)
    state = buffer("master", 100, "master_params")
    program = StepProgram((Alloc(flat), Alloc(state)), ())
    one = Subject(blueprint.layout, program, blueprint.costs, requests=Requests(moves_params=True))
    # the parameters' own segments, 422 MiB (above), and all of them in one buffer, 416 MiB and 16 KiB; of the first 112 MiB become the 100
    assert replay(one).reserved_bytes == (422 + 418) * MIB
    assert replay(one._replace(requests=Requests())).reserved_bytes == (418 + 100) * MIB


def test_a_workspace_is_taken_for_good() -> None:
    blueprint = lay_out(job(**{**LLAMA, "zero": 3}))
    plain, with_one = (replay(subject_of(blueprint)._replace(workspace_bytes=n)) for n in (0, 32 * MIB))
    assert with_one.requested_bytes - plain.requested_bytes == 32 * MIB


# ---- a real job's device ----------------------------------------------------------------------------------------------


def with_memory(some: Job, n_bytes: int) -> Job:
    return replace(some, cluster=replace(some.cluster, gpu=replace(some.cluster.gpu, memory_bytes=n_bytes)))


def test_a_job_fits_as_long_as_what_it_asks_for_does() -> None:
    some = job(**{**LLAMA, "zero": 3, "recompute": "full"})
    roomy = predict(some, allocator=AllocatorSettings())
    assert roomy.peak_reserved_bytes and roomy.allocator_bytes and roomy.device_used_bytes and roomy.alloc_retries == 0
    outside = roomy.device_used_bytes - roomy.peak_reserved_bytes
    held = sum(roomy.category_bytes_at_peak.values())
    assert roomy.device_used_bytes - 16 * MIB < held <= roomy.device_used_bytes  # nearly all is reserved at the peak
    needs = []
    last = 1.1
    for share in (1.0, 0.9, 0.5, 0.1, -0.1):  # of what is reserved beyond what was asked for
        room = roomy.allocator_bytes + share * (roomy.peak_reserved_bytes - roomy.allocator_bytes)
        tight = predict(with_memory(some, outside + int(room)), allocator=AllocatorSettings())
        assert tight.fits is (tight.fits_probability >= 0.5) and tight.fits_probability < last  # type: ignore[operator]
        assert tight.device_used_bytes is not None and tight.fits is (tight.device_used_bytes <= outside + int(room))
        last = tight.fits_probability  # type: ignore[assignment]
        needs.append(tight.fits)
    assert needs[0] and not needs[-1] and needs == sorted(needs, reverse=True)


def test_more_room_never_makes_a_job_out_of_memory_that_ran_without_retries() -> None:
    subject = subject_of(lay_out(job(**{**LLAMA, "zero": 2, "recompute": "selective"})))
    free = replay(subject)
    for beyond in (0, 2 * MIB, 1 << 40):
        assert replay(subject, limit_bytes=free.reserved_bytes + beyond) == free
    assert replay(subject, limit_bytes=free.requested_bytes - 2 * MIB).is_out_of_memory


def test_expandable_segments_hold_less() -> None:
    subject = subject_of(lay_out(job(**{**LLAMA, "zero": 3, "recompute": "full"})))
    plain, expandable = replay(subject), replay(subject, AllocatorSettings(expandable_segments=True))
    assert expandable.requested_bytes == plain.requested_bytes
    assert expandable.fragmentation_bytes < 0.7 * plain.fragmentation_bytes


def test_communicators_are_those_that_the_program_uses() -> None:
    def groups(**options: Any) -> tuple[tuple[int, ...], int]:
        some = job(**{**LLAMA, **options})
        blueprint = lay_out(some)
        return tuple(communicators(some, blueprint.program, blueprint.costs))  # type: ignore[return-value]

    assert groups(zero=0, gpus=1) == ((), 0)
    assert groups(zero=3) == ((8, 8), 0)  # gathers and reductions apart
    assert groups(zero=3, framework="fsdp2") == ((8,), 0)
    assert groups(zero=0) == ((8,), 0)  # reductions alone
    assert groups(zero=0, tp=2, gpus=16) == ((2, 2, 8), 0)  # layers; norms' gradients over them; data ranks
    assert groups(zero=0, gpus=8, pp=8)[1] == 1  # of the first stage, which has one neighbour
    assert groups(zero=1, model="mixtral-8x7b", ep=4)[1] == 3


def test_figures_outside_of_the_allocator() -> None:
    some = job(**{**LLAMA, "zero": 3})
    blueprint = lay_out(some)
    got = outside_memory(some, blueprint.program, blueprint.costs)
    # A cuBLAS handle of the forward pass and one of the backward pass.
    assert got == (some.cluster.gpu.context_bytes, 2 * 688_000_000, 2 * 32 * MIB)
    assert got.total_bytes == got.context_bytes + got.comm_bytes
    older = job(**{**LLAMA, "gpu": "a100-80", "gpus": 2})
    # 2 x (2 x 4 MiB + 8 x 16 KiB)
    assert outside_memory(older, blueprint.program, blueprint.costs).workspace_bytes == 2 * 8_519_680
    data = json.loads((catalog.hardware.DATA / "device_memory.json").read_text())
    assert all("source" in data[name] for name in data if name != "spread")
    on_cpu = tiny.job(tiny.LLAMA, Strategy(), arch="cpu")
    blueprint, memory = lay_out(on_cpu), memory_of(lay_out(on_cpu))
    used = device_memory(on_cpu, subject_of(blueprint), memory, AllocatorSettings())
    assert used[1:] == (None, memory.peak_bytes, memory.peak_bytes, 1.0)


def test_without_a_known_order_there_is_no_replay() -> None:
    some = job(**LLAMA)
    blueprint = lay_out(some)
    costs = [cost._replace(source=None) for cost in blueprint.costs]
    subject = subject_of(blueprint)._replace(costs=costs)
    memory = memory_of(blueprint)
    got = device_memory(some, subject, memory, AllocatorSettings())
    assert got.replay is None and got.used_bytes == memory.peak_bytes + 64 * MIB + got.outside.total_bytes


def test_reports_say_what_was_simulated() -> None:
    some = job(**{**LLAMA, "zero": 3})
    plain, replayed = predict(some), predict(some, allocator=AllocatorSettings())
    assert any("rounds and fragments" in note for note in plain.notes) and plain.peak_reserved_bytes is None
    assert not any("rounds and fragments" in note for note in replayed.notes)
    assert replayed.peak_allocated_bytes == plain.peak_allocated_bytes and replayed.step_s == plain.step_s
    assert StepReport.from_dict(json.loads(json.dumps(replayed.to_dict()))) == replayed
    assert {"fragmentation", "cuda_context", "comm_buffers"} <= set(replayed.category_bytes_at_peak)
