"""Which part of a model a pipeline rank holds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from estimator.job.model import ModelSpec
from estimator.job.strategy import Strategy
from estimator.sharding.units import Unit, model_units


def split_blocks(n_blocks: int, n_stages: int, sizes: tuple[int, ...] = ()) -> tuple[range, ...]:
    """Numbers of the blocks of each stage: ``sizes`` of them, or divided as evenly as can be, the first stage never more
    than another (it has the embedding)."""
    cuts = [i * n_blocks // n_stages for i in range(n_stages + 1)]
    if sizes:
        cuts = [sum(sizes[:i]) for i in range(n_stages + 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(cuts))


def units_of_rank(rank: int, pp: int, blocks: tuple[range, ...]) -> tuple[range, ...]:
    """Units of each chunk of ``rank``, of a model with units 0 (embedding), 1 to n (blocks) and n + 1 (head), whose stages
    have ``blocks``."""
    last = len(blocks) - 1
    return tuple(
        range(0 if stage == 0 else blocks[stage].start + 1, blocks[stage].stop + 1 + (stage == last))
        for stage in range(rank, len(blocks), pp)
    )


class StageUnits(NamedTuple):
    """The units of all chunks of a pipeline rank, in the model's order."""

    units: tuple[Unit, ...]
    numbers: tuple[int, ...]
    """Of each: its place among the model's units."""
    chunks: tuple[range, ...]
    """Indices into ``units`` of each chunk's."""


@lru_cache(maxsize=256)
def untied(spec: ModelSpec) -> ModelSpec:
    """``spec`` with a projection to the vocabulary of its own: first and last stage each hold a copy of a tied table."""
    return replace(spec, tied_embeddings=False) if spec.tied_embeddings else spec


def stage_units(spec: ModelSpec, strategy: Strategy, rank: int) -> StageUnits:
    """What pipeline rank ``rank`` holds of ``spec``. A tied table is a parameter of embedding and head, marked as shared."""
    return units_of_stages(spec, strategy)[rank]


@lru_cache(maxsize=64)
def units_of_stages(spec: ModelSpec, strategy: Strategy) -> tuple[StageUnits, ...]:
    """``stage_units`` of every pipeline rank."""
    blocks = split_blocks(spec.n_layers, strategy.pp * strategy.virtual_pp, strategy.pp_layers)
    units = model_units(untied(spec))
    if spec.tied_embeddings:
        units = tuple(_marked(unit) for unit in units)
    return tuple(_held(units, units_of_rank(rank, strategy.pp, blocks)) for rank in range(strategy.pp))


def _held(units: Sequence[Unit], spans: Sequence[range]) -> StageUnits:
    """Of the model's ``units`` those in ``spans``, a chunk each."""
    ends = itertools.accumulate(len(span) for span in spans)
    numbers = tuple(number for span in spans for number in span)
    chunks = tuple(range(end - len(span), end) for span, end in zip(spans, ends, strict=True))
    return StageUnits(tuple(units[number] for number in numbers), numbers, chunks)


_TABLES = {"embed": "tokens.weight", "head": "out.weight"}


def _marked(unit: Unit) -> Unit:
    table = _TABLES.get(unit.name)
    if table is None:
        return unit
    return unit._replace(params=tuple(p._replace(shared=True) if p.name == table else p for p in unit.params))
