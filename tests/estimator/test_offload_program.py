"""Rules of every program whose optimizer is shared, late, or in files."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.job import Strategy
from estimator.job.mesh import Mesh
from estimator.schedule.buffers import host_numel
from estimator.schedule.events import Collective, Copy, GradNorm, StepProgram, Update, Wait
from estimator.schedule.nvme import N_SLOTS, record_bytes
from estimator.schedule.program import build_program
from estimator.sharding.layout import Layout, make_layout
from estimator.sharding.units import model_units
from tests.estimator.test_program import (
    SPEC,
    TIED,
    _nothing_leaks_and_nothing_is_freed_twice,
    _parameters_are_there_when_read,
    events,
)

OFFLOADS = st.one_of(
    st.builds(dict, offload=st.just("optimizer"), offload_fraction=st.sampled_from([1e-3, 0.3, 0.5, 0.9])),
    st.just({"offload": "optimizer", "delayed_update": True}),
    st.just({"offload": "optimizer:nvme"}),
)
COMMON = st.fixed_dictionaries(
    {
        "zero_stage": st.integers(0, 3),
        "dtype": st.sampled_from(["fp32", "fp16", "bf16"]),
        "optimizer": st.sampled_from(["adamw", "sgd"]),
        "bucket_bytes": st.integers(1, 20_000),
        "grad_clip": st.sampled_from([0.0, 1.0]),
        "persistent_numel": st.sampled_from([0, 16, 10**6]),
    }
)


@settings(max_examples=200, deadline=None)
@given(
    OFFLOADS, COMMON, st.sampled_from([1, 2, 3, 64]), st.integers(1, 4), st.sampled_from([SPEC, TIED]), st.booleans()
)
def test_rules(offload: dict, common: dict, dp: int, n: int, spec: object, fused_step: bool) -> None:
    strategy = Strategy(**offload, **common)
    stage = strategy.zero_stage if dp > 1 else 0
    layout = make_layout(model_units(spec), strategy, stage, dp)  # type: ignore[arg-type]
    program = build_program(layout, strategy, stage, Mesh(dp=dp), n, fused_step=fused_step)
    _nothing_leaks_and_nothing_is_freed_twice(program)
    _parameters_are_there_when_read(layout, program)
    _every_element_is_stepped_once_and_travels_once(program, layout, strategy)
    _waits_name_something_that_was_started(program)


def _every_element_is_stepped_once_and_travels_once(program: StepProgram, layout: Layout, strategy: Strategy) -> None:
    stepped: Counter[int] = Counter()
    travelled: Counter[tuple[str, int]] = Counter()
    width = {"fp32": 4, "fp16": 2, "bf16": 2}[strategy.dtype]
    for event in events(program):
        if isinstance(event, Update):
            stepped[event.group] += event.numel
        elif isinstance(event, Copy):
            travelled[event.stream, event.group] += event.n_bytes
    for group in layout.groups:
        g, on_host = group.number, host_numel(group, strategy)
        assert stepped[g] == group.shard_numel
        assert travelled["d2h", g] == travelled["h2d", g] == on_host * width
        moved = record_bytes(group, strategy) if strategy.offload_nvme else 0
        assert travelled["nvme_read", g] == travelled["nvme_write", g] == moved
    roles = [e.buffer.role for e in program.init if e.buffer.place == "host"]  # type: ignore[union-attr]
    n_slots = min(N_SLOTS, len(layout.groups)) if strategy.offload_nvme else 0
    assert sum(role.startswith("slot_") for role in roles) == n_slots
    assert not strategy.offload_nvme or "master" not in roles


def _waits_name_something_that_was_started(program: StepProgram) -> None:
    started: set[tuple[str, int]] = set()
    for event in events(program):
        if isinstance(event, Collective | Copy):
            started.add(event.tag)
        elif isinstance(event, Update | GradNorm):
            started.add(("update" if isinstance(event, Update) else "square", event.group))
        elif isinstance(event, Wait):
            assert event.tag in started
