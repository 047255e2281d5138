"""Which part of each parameter a tensor-parallel rank holds (Shoeybi et al. 2019, section 3; vocabulary: section 3, last part),
or an expert-parallel one.

Projections into attention and MLP are split by output (columns of the paper's matrices), those out of them by input (rows),
embedding and head by vocabulary; experts by number. Everything else every rank holds whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from estimator.sharding.units import Param, Split, Unit, splits_of

SPLIT_DIM = {
    "tokens.weight": 0, "attn.q.weight": 0, "attn.q.bias": 0, "attn.k.weight": 0, "attn.k.bias": 0, "attn.v.weight": 0,
    "attn.v.bias": 0, "attn.q_b.weight": 0, "attn.kv_b.weight": 0, "attn.sinks": 0, "attn.out.weight": 1, "mlp.gate.weight": 0, "mlp.gate.bias": 0,
    "mlp.up.weight": 0, "mlp.up.bias": 0, "mlp.down.weight": 1, "mlp.experts.gate": 1, "mlp.experts.up": 1,
    "mlp.experts.down": 2, "mlp.shared.gate.weight": 0, "mlp.shared.gate.bias": 0, "mlp.shared.up.weight": 0,
    "mlp.shared.up.bias": 0, "mlp.shared.down.weight": 1, "out.weight": 0, "out.bias": 0,
}  # fmt: skip
"""By name within a unit: the dimension along which a parameter is split."""

EXPERTS = "mlp.experts."
"""What names of parameters begin with that hold something of every expert, by its number in their first dimension."""


def share(size: int, n_ranks: int) -> int:
    """Of ``size`` what a rank holds room for; where it does not divide (a vocabulary), the last ranks' is not full."""
    return -(-size // n_ranks)


def part(param: Param, tp: int, ep: int = 1) -> Param:
    """What one of ``tp`` tensor-parallel and ``ep`` expert-parallel ranks holds of ``param``."""
    shared, shape = param._replace(split=split_of(param.name, param.shape, tp, ep)), list(param.shape)
    for split in splits_of(shared.split):
        shape[split.dim] = share(split.size, tp if split.axis == "tp" else ep)
    return shared._replace(shape=tuple(shape))


def split_of(name: str, shape: Sequence[int], tp: int, ep: int = 1) -> Split | None:
    """How parameter ``name`` of a unit, ``shape`` as a whole, is shared."""
    dim = SPLIT_DIM.get(name)
    split = None if dim is None or tp == 1 else Split(dim, shape[dim])
    return Split(0, shape[0], "ep", split) if ep > 1 and name.startswith(EXPERTS) else split


def parts(units: tuple[Unit, ...], tp: int, ep: int = 1) -> tuple[Unit, ...]:
    """``units`` as one of ``tp`` tensor-parallel and ``ep`` expert-parallel ranks holds them; equal parameter lists stay one object."""
    known = {id(unit.params): unit.params for unit in units}
    split = {number: _parts(params, tp, ep) for number, params in known.items()}
    return tuple(
        Unit(unit.name, unit.kind, split[id(unit.params)], unit.borrows, unit.backward_reads) for unit in units
    )


@lru_cache(maxsize=1024)
def _parts(params: tuple[Param, ...], tp: int, ep: int) -> tuple[Param, ...]:
    return tuple(part(param, tp, ep) for param in params)
