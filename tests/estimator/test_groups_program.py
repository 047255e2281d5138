"""Programs with groups of ranks and compressed messages keep every program's rules, and send what is there."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.job import ModelSpec, Strategy
from estimator.schedule.events import Alloc, Buffer, Collective, Free, Keep, Pack, StepProgram, Unpack
from estimator.schedule.messages import message_bytes
from tests.estimator.test_program import (
    SPEC,
    TIED,
    _nothing_leaks_and_nothing_is_freed_twice,
    _parameters_are_there_when_read,
    _waits_name_something_that_was_started,
    events,
    programme,
)

DP = 8
SIZES = st.sampled_from([2, 4, 8])
COMMON = {
    "dtype": st.sampled_from(["fp32", "bf16"]),
    "grad_dtype": st.sampled_from(["model", "fp32"]),
    "bucket_bytes": st.integers(1, 20_000),
    "prefetch_depth": st.integers(0, 4),
    "persistent_numel": st.sampled_from([0, 16]),
}
GROUPED = st.builds(
    Strategy, zero_stage=st.integers(1, 3), shard_size=SIZES,
    offload=st.sampled_from(["none", "optimizer", "optimizer,param"]), **COMMON,
)  # fmt: skip
PLUS_PLUS = st.builds(
    Strategy, zero_stage=st.just(3), quantized_weights=st.booleans(), secondary_shard=st.sampled_from([0, 2, 8]),
    quantized_grads=st.sampled_from([0, 2, 4, 8]), offload=st.sampled_from(["none", "optimizer"]), **COMMON,
)  # fmt: skip
COMPRESSED = st.builds(
    Strategy, zero_stage=st.integers(0, 1), grad_compression=st.sampled_from(["one_bit", "adacomp"]),
    offload=st.sampled_from(["none", "optimizer", "optimizer,param"]), **COMMON,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.one_of(GROUPED, PLUS_PLUS, COMPRESSED), st.integers(1, 4), st.sampled_from([SPEC, TIED]))
def test_rules_of_every_program(strategy: Strategy, n: int, spec: ModelSpec) -> None:
    layout, program = programme(strategy, DP, n, spec)
    _nothing_leaks_and_nothing_is_freed_twice(program)
    _parameters_are_there_when_read(layout, program)
    _waits_name_something_that_was_started(program)
    _messages_are_whole(program)


def _messages_are_whole(program: StepProgram) -> None:
    """Whatever is packed, sent or unpacked is alive, and of the size that the event says."""
    live: dict[tuple[int, str], Buffer] = {
        (e.buffer.group, e.buffer.role): e.buffer for e in program.init if isinstance(e, Alloc)
    }
    for e in events(program):
        if isinstance(e, Alloc):
            live[e.buffer.group, e.buffer.role] = e.buffer
        elif isinstance(e, Free):
            del live[e.buffer.group, e.buffer.role]
        elif isinstance(e, Pack):
            for part, n_bytes in message_bytes(e.codec, e.numel).items():
                assert live[e.group, part].n_bytes == n_bytes
                assert e.rows == 1 or live[e.group, f"unordered_{part}"].n_bytes == n_bytes
            assert live[e.group, e.source].n_bytes in (2 * e.numel, 4 * e.numel)
            assert e.error is None or live[e.group, e.error].n_bytes == 4 * e.numel
        elif isinstance(e, Unpack):
            for part, n_bytes in message_bytes(e.codec, e.numel).items():
                assert live[e.group, f"received_{part}"].n_bytes == e.pieces * n_bytes
            assert e.target == "own_grads" or live[e.group, e.target].n_bytes in (2 * e.numel, 4 * e.numel)
        elif isinstance(e, Keep):
            assert live[e.group, "secondary_params"].n_bytes == e.n_bytes
        elif isinstance(e, Collective) and e.ends is not None:
            source, target = (live[e.group, role] for role in e.ends)
            assert e.span is not None
            assert target.n_bytes == e.n_bytes == source.n_bytes * (e.span.size if e.op == "all_gather" else 1)
