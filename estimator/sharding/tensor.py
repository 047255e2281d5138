"""Which part of each parameter a tensor-parallel rank holds (Shoeybi et al. 2019, section 3; vocabulary: section 3, last part),
or an expert-parallel one.

Projections into attention and MLP are split by output (columns of the paper's matrices), those out of them by input (rows),
embedding and head by vocabulary; experts by number. Everything else every rank holds whole.
"""

from __future__ import annotations

from estimator.sharding.units import Param, Split, Unit

SPLIT_DIM = {
    "tokens.weight": 0, "attn.q.weight": 0, "attn.q.bias": 0, "attn.k.weight": 0, "attn.k.bias": 0, "attn.v.weight": 0,
    "attn.v.bias": 0, "attn.out.weight": 1, "mlp.gate.weight": 0, "mlp.gate.bias": 0, "mlp.up.weight": 0, "mlp.up.bias": 0,
    "mlp.down.weight": 1, "out.weight": 0, "out.bias": 0,
}  # fmt: skip
"""By name within a unit: the dimension along which a parameter is split."""

EXPERTS = "mlp.experts."
"""What names of parameters begin with that hold something of every expert, by its number in their first dimension."""


def share(size: int, n_ranks: int) -> int:
    """Of ``size`` what a rank holds room for; where it does not divide (a vocabulary), the last ranks' is not full."""
    return -(-size // n_ranks)


def part(param: Param, tp: int, ep: int = 1) -> Param:
    """What one of ``tp`` tensor-parallel and ``ep`` expert-parallel ranks holds of ``param``."""
    if param.name.startswith(EXPERTS):
        n_experts, *rest = param.shape
        return param if ep == 1 else param._replace(shape=(n_experts // ep, *rest), split=Split(0, n_experts, "ep"))
    dim = SPLIT_DIM.get(param.name)
    if dim is None or tp == 1:
        return param
    size = param.shape[dim]
    shape = (*param.shape[:dim], share(size, tp), *param.shape[dim + 1 :])
    return param._replace(shape=shape, split=Split(dim, size))


def parts(units: tuple[Unit, ...], tp: int, ep: int = 1) -> tuple[Unit, ...]:
    """``units`` as one of ``tp`` tensor-parallel and ``ep`` expert-parallel ranks holds them; equal parameter lists stay one object."""
    by_params: dict[tuple[Param, ...], tuple[Param, ...]] = {}
    made = []
    for unit in units:
        if unit.params not in by_params:
            by_params[unit.params] = tuple(part(param, tp, ep) for param in unit.params)
        made.append(unit._replace(params=by_params[unit.params]))
    return tuple(made)
