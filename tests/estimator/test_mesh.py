"""The mesh of a job's ranks, and which part of the parameters each tensor-parallel rank holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.job.mesh import Mesh, Span
from estimator.sharding.tensor import SPLIT_DIM, parts
from estimator.sharding.units import Param, Split, Unit, count_params, model_units
from tests.runtime import tiny

SIZES = st.sampled_from((1, 2, 3, 4))


def test_neighbours_are_tensor_parallel_then_context_then_data_then_stages() -> None:
    mesh = Mesh(tp=2, cp=3, dp=4, pp=5)
    assert mesh.size == 120 and mesh.n_data == 12
    assert [mesh.span(axis) for axis in ("tp", "cp", "dp", "pp")] == [Span(2), Span(3, 2), Span(4, 6), Span(5, 24)]
    assert mesh.span("dp").ranks(8) == [2, 8, 14, 20]
    assert mesh.data_span() == Span(12, 2) and mesh.data_span(3) == Span(3, 2)
    assert Mesh(dp=8).data_span() is None and Mesh(dp=8).data_span(2, 4) == Span(2, 4)


@given(SIZES, SIZES, SIZES, SIZES, st.data())
def test_every_rank_has_one_place(tp: int, cp: int, dp: int, pp: int, data: st.DataObject) -> None:
    mesh = Mesh(tp, cp, dp, pp)
    rank = data.draw(st.integers(0, mesh.size - 1))
    t, c, d, p = (mesh.place(axis, rank) for axis in ("tp", "cp", "dp", "pp"))
    assert rank == t + tp * (c + cp * (d + dp * p))
    assert mesh.data_place(rank) == c + cp * d
    for axis in ("tp", "cp", "dp", "pp"):
        group = mesh.span(axis).ranks(rank)
        assert group[mesh.place(axis, rank)] == rank
        assert {mesh.place(axis, other) for other in group} == set(range(len(group)))


def test_parts_of_a_decoder_by_hand() -> None:
    """GPT of 61 tokens, width 32, MLP 128: a half of every projection, 31 of the vocabulary's rows, all of the norms."""
    held = {param.name: param for unit in parts(model_units(tiny.GPT), 2) for param in unit.params}
    assert held["tokens.weight"] == Param("tokens.weight", (31, 32), split=Split(0, 61))
    assert held["attn.q.weight"].shape == (16, 32) and held["attn.q.bias"].shape == (16,)
    assert held["attn.out.weight"] == Param("attn.out.weight", (32, 16), split=Split(1, 32))
    assert held["mlp.down.weight"].shape == (32, 64) and held["mlp.down.bias"] == Param("mlp.down.bias", (32,))
    assert held["attn_norm.weight"].split is None and held["positions.weight"].shape == (16, 32)


@pytest.mark.parametrize("spec", tiny.ALL, ids=lambda spec: spec.name)
def test_all_ranks_together_hold_the_model_and_what_is_whole_once_more_each(spec: object) -> None:
    units = model_units(spec)  # type: ignore[arg-type]
    whole = sum(p.numel for u in units for p in u.params if p.name not in SPLIT_DIM)
    padding = sum((-p.shape[0] % 2) * p.numel // p.shape[0] for u in units for p in u.params if p.name in ("tokens.weight", "out.weight"))  # fmt: skip
    assert 2 * count_params(parts(units, 2)) == count_params(units) + whole + padding
    assert parts(units, 1) == units


def test_equal_blocks_stay_one_object() -> None:
    units = (Unit("a", "block", params := (Param("mlp.up.weight", (4, 2)),)), Unit("b", "block", params))
    first, second = parts(units, 2)
    assert first.params is second.params
