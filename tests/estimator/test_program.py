"""The step program: hand-counted traffic, and rules that every program keeps."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.catalog import model
from estimator.job import ModelSpec, Strategy
from estimator.job.mesh import Mesh
from estimator.schedule.events import (
    Accumulate,
    Alloc,
    Collective,
    Compute,
    Copy,
    Free,
    GradNorm,
    Keep,
    Pack,
    StepProgram,
    Unpack,
    Update,
    Wait,
)
from estimator.schedule.program import build_program
from estimator.sharding.layout import Layout, make_layout
from estimator.sharding.units import model_units

SPEC = ModelSpec(
    name="t", family="custom", n_layers=3, d_model=16, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, vocab_size=40,
    max_positions=8,
)  # fmt: skip


def programme(strategy: Strategy, dp: int = 4, n: int = 1, spec: ModelSpec = SPEC) -> tuple[Layout, StepProgram]:
    stage = strategy.zero_stage if dp > 1 else 0
    layout = make_layout(model_units(spec), strategy, stage, dp)
    return layout, build_program(layout, strategy, stage, Mesh(dp=dp), n)


def events(program: StepProgram) -> list:
    return [e for s in program.step for _ in range(s.repeat) for e in s.events]


def calls(program: StepProgram) -> dict[tuple[str, str], int]:
    return dict(Counter((e.op, e.purpose) for e in events(program) if isinstance(e, Collective)))


def test_collectives_of_each_stage() -> None:
    """Five units; buckets of one byte make five groups. Two micro-batches."""
    small = {"bucket_bytes": 1, "prefetch_depth": 1}
    norm = {("all_reduce", "grad_norm"): 1}
    assert calls(programme(Strategy(zero_stage=0, **small), n=2)[1]) == {("all_reduce", "grads"): 5}
    assert calls(programme(Strategy(zero_stage=1, **small), n=2)[1]) == {
        ("reduce_scatter", "grads"): 5, ("all_gather", "updated_params"): 5, **norm,
    }  # fmt: skip
    assert calls(programme(Strategy(zero_stage=2, **small), n=2)[1]) == {
        ("reduce_scatter", "grads"): 10, ("all_gather", "updated_params"): 5, **norm,
    }  # fmt: skip
    # forward gathers 5 units; backward finds the head still there, and the embedding needs no weights: 3 blocks again
    assert calls(programme(Strategy(zero_stage=3, **small), n=2)[1]) == {
        ("reduce_scatter", "grads"): 10, ("all_gather", "params"): 2 * (5 + 3), **norm,
    }  # fmt: skip


def test_deeper_prefetch_keeps_the_last_block() -> None:
    """The last block is read again three turns later, after the head's two: depth 3 keeps it and saves a gather."""
    _, program = programme(Strategy(zero_stage=3, prefetch_depth=2))
    assert calls(program)[("all_gather", "params")] == 5 + 3
    _, program = programme(Strategy(zero_stage=3, prefetch_depth=3))
    assert calls(program)[("all_gather", "params")] == 5 + 2


def test_one_rank_communicates_nothing() -> None:
    assert calls(programme(Strategy(zero_stage=3), dp=1, n=3)[1]) == {}


def test_full_tensors_are_counted() -> None:
    layout, program = programme(Strategy(zero_stage=1, bucket_bytes=1))
    reduced = [e.n_bytes for e in events(program) if isinstance(e, Collective) and e.purpose == "grads"]
    assert sorted(reduced) == sorted(g.padded_numel * 2 for g in layout.groups)


@pytest.mark.parametrize(
    ("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)]
)  # Rajbhandari et al. 2020, figure 1: 7.5B parameters, 64 GPUs, fp16 Adam
def test_the_zero_papers_example(stage: int, gigabytes: float) -> None:
    strategy = Strategy(zero_stage=stage, dtype="fp16")
    _, program = programme(strategy, dp=64, spec=model("zero-paper-7.5b"))
    states = ("params", "master_params", "optimizer_state")
    held = sum(e.buffer.n_bytes for e in program.init if isinstance(e, Alloc) and e.buffer.category in states)
    grads = sum(e.buffer.n_bytes for e in events(program) if isinstance(e, Alloc) and e.buffer.category == "grads")
    assert round((held + grads) / 1e9, 1) == gigabytes


STRATEGIES = st.builds(
    Strategy,
    zero_stage=st.integers(0, 3),
    offload=st.sampled_from(["none", "optimizer", "optimizer,param"]),
    dtype=st.sampled_from(["fp32", "fp16", "bf16"]),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    bucket_bytes=st.integers(1, 20_000),
    prefetch_depth=st.integers(0, 4),
    persistent_numel=st.sampled_from([0, 16, 10**6]),
    grad_clip=st.sampled_from([0.0, 1.0]),
)
TIED = ModelSpec(
    name="tied", family="custom", n_layers=2, d_model=16, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=32, vocab_size=40,
    max_positions=8, tied_embeddings=True,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    STRATEGIES, st.sampled_from([1, 2, 3, 64]), st.integers(1, 5), st.sampled_from([SPEC, TIED]),
    st.lists(st.booleans(), min_size=5, max_size=5),
)  # fmt: skip
def test_rules_of_every_program(strategy: Strategy, dp: int, n: int, spec: ModelSpec, frozen: list[bool]) -> None:
    """``frozen``: units of which all but the last parameter are, or the unit as a whole, in turn; never the model."""
    stage = strategy.zero_stage if dp > 1 else 0
    units = [
        unit._replace(
            params=tuple(
                p._replace(trained=not is_frozen or (i % 2 == 1 and p is unit.params[-1])) for p in unit.params
            )
        )
        for i, (unit, is_frozen) in enumerate(zip(model_units(spec), frozen, strict=False))
    ]
    if not any(unit.is_trained for unit in units):
        units[-1] = model_units(spec)[-1]
    layout = make_layout(units, strategy, stage, dp)
    program = build_program(layout, strategy, stage, Mesh(dp=dp), n)
    _nothing_leaks_and_nothing_is_freed_twice(program)
    _units_run_in_order(program, len(units), n, next(i for i, unit in enumerate(units) if unit.is_trained))
    _parameters_are_there_when_read(layout, program)
    _waits_name_something_that_was_started(program)
    updated = Counter(e.group for e in events(program) if isinstance(e, Update))
    assert updated == Counter(g.number for g in layout.groups if g.kind.trained)
    slots = sorted((s.unit, s.param.name) for g in layout.groups for s in layout.slots(g))
    assert slots == sorted((i, p.name) for i, unit in enumerate(units) for p in unit.params)


def _nothing_leaks_and_nothing_is_freed_twice(program: StepProgram) -> None:
    live = {e.buffer for e in program.init if isinstance(e, Alloc)}
    start = set(live)
    for event in events(program):
        if isinstance(event, Alloc):
            assert event.buffer not in live
            live.add(event.buffer)
        elif isinstance(event, Free):
            live.remove(event.buffer)
    assert live == start


def _units_run_in_order(program: StepProgram, n_units: int, n: int, first_trained: int) -> None:
    forward = [(u, "forward") for u in range(n_units - 1)] + [(n_units - 1, "loss")]
    one = forward + [(u, "backward") for u in reversed(range(first_trained, n_units))]
    assert [(e.unit, e.phase) for e in events(program) if isinstance(e, Compute)] == one * n


def _parameters_are_there_when_read(layout: Layout, program: StepProgram) -> None:
    """At each compute the groups it reads are allocated, and the compute stream has waited for their arrival."""
    resident = {e.buffer.group for e in program.init if isinstance(e, Alloc) and e.buffer.role == "full_params"}
    arriving: dict[tuple[str, int], int] = {}
    for event in events(program):
        if isinstance(event, Alloc) and event.buffer.role == "full_params":
            resident.add(event.buffer.group)
        elif isinstance(event, Free) and event.buffer.role == "full_params":
            resident.remove(event.buffer.group)
        elif isinstance(event, Copy | Collective) and event.purpose == "params":
            arriving[event.tag] = event.group
        elif isinstance(event, Wait) and event.stream in ("compute", "gather"):
            arriving.pop(event.tag, None)
        elif isinstance(event, Compute):
            unit = layout.units[event.unit]
            if event.phase != "backward" or unit.backward_reads:
                needed = {g for u in (event.unit, *unit.borrows) for g in layout.groups_of_unit[u]}
                assert needed <= resident
                assert needed.isdisjoint(arriving.values())


def _waits_name_something_that_was_started(program: StepProgram) -> None:
    started = set()
    for event in events(program):
        if isinstance(event, Collective | Copy):
            started.add(event.tag)
        elif isinstance(event, Update):
            started.add(("update", event.group))
        elif isinstance(event, Wait):
            assert event.tag in started
        else:
            assert isinstance(event, Alloc | Free | Compute | Accumulate | GradNorm | Pack | Unpack | Keep)


@pytest.mark.parametrize(("offload", "dtype"), list(itertools.product(["none", "optimizer"], ["bf16", "fp32"])))
def test_more_sharding_never_raises_model_states(offload: str, dtype: str) -> None:
    """Sizes are divided evenly (every parameter has a multiple of 128 elements), so padding plays no part."""
    spec = replace(SPEC, d_model=128, head_dim=64, d_ff=128, vocab_size=128)

    def held(stage: int, dp: int) -> int:
        strategy = Strategy(zero_stage=stage, offload=offload, dtype=dtype)  # type: ignore[arg-type]
        _, program = programme(strategy, dp, spec=spec)
        return sum(e.buffer.n_bytes for e in program.init if isinstance(e, Alloc) and e.buffer.place == "device")

    sizes = [held(stage, 8) for stage in range(4)]
    assert sizes == sorted(sizes, reverse=True)
    by_ranks = [held(3, dp) for dp in (2, 4, 8, 16)]
    assert by_ranks == sorted(by_ranks, reverse=True)
