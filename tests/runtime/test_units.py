"""The reference decoder is made of exactly the parameters that the estimator counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from estimator.errors import InputError
from estimator.job import ModelSpec
from estimator.sharding.units import count_params, model_units
from runtime.models import Decoder
from runtime.units import find_units
from tests.runtime import tiny


@pytest.mark.parametrize("spec", tiny.ALL, ids=lambda s: s.name)
def test_decoder_has_the_estimators_units(spec: ModelSpec) -> None:
    live = [found.unit for found in find_units(Decoder(spec))]
    assert [(u.name, u.params, u.borrows, u.backward_reads) for u in live] == [
        (u.name, u.params, u.borrows, u.backward_reads) for u in model_units(spec)
    ]
    assert count_params(live) == sum(p.numel() for p in Decoder(spec).parameters())


def test_parameters_outside_children_are_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    with pytest.raises(InputError, match="scale"):
        find_units(model)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="no parameters"):
        find_units(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize(
    ("change", "word"),
    [({"positions": "alibi", "position_rows": 0}, "ALiBi"), ({"pre_norm": False}, "after the residual"),
     ({"embed_dim": 8}, "projected")],
)  # fmt: skip
def test_what_the_decoder_lacks_is_said(change: dict, word: str) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match=word):
        Decoder(replace(tiny.GPT, **change))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class _Stack(nn.Module):
    """As Hugging Face models have theirs: inside a module of its own."""

    def __init__(self, n_blocks: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.blocks = nn.ModuleList(_Block() for _ in range(n_blocks))


@pytest.mark.parametrize(
    ("n_blocks", "names"), [(1, ["model", "head"]), (2, ["model.embed", "model.blocks.0", "model.blocks.1", "head"])]
)
def test_a_list_of_blocks_is_found_in_a_child(n_blocks: int, names: list[str]) -> None:
    model = nn.Module()
    model.model, model.head = _Stack(n_blocks), nn.Linear(2, 3)
    assert [found.unit.name for found in find_units(model)] == names
    model.model.register_parameter("scale", nn.Parameter(torch.ones(1)))
    assert [found.unit.name for found in find_units(model)] == ["model", "head"]
