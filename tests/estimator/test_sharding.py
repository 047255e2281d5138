"""The sharding arithmetic: hand-computed layouts and what holds for every layout."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.job import ModelSpec, Strategy
from estimator.sharding.layout import ALIGNMENT_NUMEL, Kind, align, make_layout
from estimator.sharding.units import Param, Unit, count_params, model_units

UNITS = (
    Unit("embed", "embed", (Param("w", (10, 4)),)),  # 40
    Unit("blocks.0", "block", (Param("w", (5, 5)), Param("b", (5,)))),  # 25 -> 32, 5 -> 8: 40
    Unit("blocks.1", "block", (Param("w", (5, 5)), Param("b", (5,)))),
    Unit("head", "head", (Param("w", (3,)),)),  # 3 -> 8
)


def test_stage_3_makes_a_group_of_every_unit() -> None:
    layout = make_layout(UNITS, Strategy(zero_stage=3), 3, dp=4)
    assert [list(g.units) for g in layout.groups] == [[0], [1], [2], [3]]
    assert [(g.numel, g.shard_numel, g.padded_numel) for g in layout.groups] == [
        (40, 16, 64), (40, 16, 64), (40, 16, 64), (8, 8, 32),
    ]  # fmt: skip
    assert [slot.offset for slot in layout.slots(layout.groups[1])] == [0, 32]


def test_buckets_fill_from_the_last_unit() -> None:
    """48 elements are wanted: head and blocks.1 (8 + 40) make one bucket, blocks.0 and embed the next."""
    layout = make_layout(UNITS, Strategy(zero_stage=1, bucket_bytes=96), 1, dp=2)
    assert [list(g.units) for g in layout.groups] == [[0, 1], [2, 3]]
    assert [(g.numel, g.shard_numel) for g in layout.groups] == [(80, 40), (48, 24)]
    assert layout.groups_of_unit == ((0,), (0,), (1,), (1,))


def test_stage_0_does_not_shard() -> None:
    layout = make_layout(UNITS, Strategy(zero_stage=0, bucket_bytes=1 << 20), 0, dp=64)
    assert [(g.numel, g.shard_numel, g.padded_numel) for g in layout.groups] == [(128, 128, 128)]


def test_parameters_of_one_kind_share_a_group() -> None:
    """w is frozen in blocks.0; with 5 elements b stays in both blocks, and 3 in the head: 8 each, one group of all three."""
    frozen = UNITS[1]._replace(params=(Param("w", (5, 5), trained=False), Param("b", (5,))))
    units = (UNITS[0], frozen, *UNITS[2:])
    layout = make_layout(units, Strategy(zero_stage=3, persistent_numel=5), 3, dp=4)
    assert [(list(g.units), g.kind, g.numel) for g in layout.groups] == [
        ([0], Kind(), 40), ([1], Kind(trained=False), 32), ([1, 2, 3], Kind(resident=True), 24), ([2], Kind(), 32),
    ]  # fmt: skip
    assert layout.groups_of_unit == ((0,), (1, 2), (2, 3), (2,))
    assert [(s.unit, s.param.name, s.offset) for s in layout.slots(layout.groups[2])] == [
        (1, "b", 0), (2, "b", 8), (3, "w", 16),
    ]  # fmt: skip
    assert make_layout(units, Strategy(zero_stage=2, persistent_numel=5), 2, dp=4).small_numel == 0


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=4)
unit_lists = st.lists(shapes, min_size=1, max_size=9).map(
    lambda lists: tuple(
        Unit(f"u{i}", "u", tuple(Param(f"p{j}", shape) for j, shape in enumerate(shapes)))
        for i, shapes in enumerate(lists)
    )
)


@settings(max_examples=200, deadline=None)
@given(unit_lists, st.integers(0, 3), st.integers(1, 70), st.integers(1, 3000), st.booleans())
def test_every_layout_is_a_partition(units: tuple[Unit, ...], stage: int, dp: int, bucket: int, offload: bool) -> None:
    strategy = Strategy(
        zero_stage=stage, bucket_bytes=bucket, offload="optimizer,param" if offload else "none", dtype="fp32"
    )
    layout = make_layout(units, strategy, stage, dp)
    assert [u for g in layout.groups for u in g.units] == list(range(len(units)))
    for group in layout.groups:
        assert group.shard_numel * layout.n_shards == group.padded_numel >= group.numel
        assert group.padded_numel - group.numel < ALIGNMENT_NUMEL * layout.n_shards
        assert group.shard_numel % ALIGNMENT_NUMEL == 0
        slots = list(layout.slots(group))
        assert [s.unit for s in slots] == [u for u in group.units for _ in units[u].params]
        ends = [s.offset + align(s.param.numel) for s in slots]
        assert [s.offset for s in slots] == [0, *ends[:-1]] and ends[-1] == group.numel
    if stage < 3 and not offload:
        assert all(g.numel * 4 >= bucket // 4 * 4 for g in layout.groups[1:])


def test_a_shared_parameter_is_counted_once() -> None:
    spec = ModelSpec(
        name="t", family="custom", n_layers=2, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=16, vocab_size=10,
        max_positions=4, tied_embeddings=True,
    )  # fmt: skip
    block = 8 + 64 + 32 + 32 + 64 + 8 + 3 * 128
    assert count_params(model_units(spec)) == 80 + 2 * block + 8
