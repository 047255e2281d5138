"""Tables whose gradients are exchanged row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from estimator.sharding.units import Unit

TOKEN_TABLE = "embed.tokens.weight"
"""The token embedding of a decoder."""


def with_rows(units: Sequence[Unit], rows: Mapping[str, int]) -> tuple[Unit, ...]:
    """``units`` whose tables say how many rows a micro-batch looks up; ``rows`` by the names of parameters, their units' in front."""
    return tuple(
        unit._replace(params=tuple(p._replace(rows=rows.get(f"{unit.name}.{p.name}", 0)) for p in unit.params))
        for unit in units
    )
