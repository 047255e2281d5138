"""Optimizer steps over many tensors: what each rule keeps and computes, and the cost of a step."""

from __future__ import annotations

from typing import NamedTuple

from estimator.errors import require_choice
from estimator.ops.kernels.chip import Tile, ceil_div
from estimator.ops.kernels.tables import rounded_chunk
from estimator.ops.operator import Op

PACK = 4
"""Elements of one access."""
UNROLL = 2
_CHUNK = 8192
STATE_BLOCK = 256
"""Elements of an 8-bit state that share one fp32 magnitude."""


class RuleCost(NamedTuple):
    """One optimizer, as far as bytes and FLOPs go."""

    kernel: str
    """Its name in ``KERNELS``."""
    n_states: int
    """Numbers kept for each parameter."""
    flops: int
    """Operations per element; a root or a division counts as one."""


RULES = {
    "adamw": RuleCost("adam", 2, 15),
    "adam": RuleCost("adam", 2, 16),
    "sgd": RuleCost("sgd", 1, 7),
    "sgd_nesterov": RuleCost("sgd", 1, 9),
    "lion": RuleCost("lion", 1, 12),
    "adagrad": RuleCost("adagrad", 1, 10),
    "lamb": RuleCost("lamb", 2, 28),
}
"""Rules of ``runtime.kernels.rules`` by name."""


def chunk_elements(tile: Tile) -> int:
    """Elements that one block steps."""
    return rounded_chunk(_CHUNK, tile.threads * PACK * UNROLL)


def n_lists(rule: str, *, copies: bool, eight_bit: bool = False) -> int:
    """Lists of tensors in the table of one ``optimizer_step``: parameters, gradients, states, copies, magnitudes of 8-bit
    states."""
    return 2 + RULES[rule].n_states * (2 if eight_bit else 1) + copies


def state_bytes(rule: str, numel: int, *, eight_bit: bool = False) -> int:
    """Bytes of the states of ``numel`` parameters: fp32, or 8-bit codes with a magnitude for each block."""
    each = numel + 4 * ceil_div(numel, STATE_BLOCK) if eight_bit else 4 * numel
    return RULES[rule].n_states * each


def cost(rule: str, numel: int, grad_itemsize: int, copy_itemsize: int = 0, *, eight_bit: bool = False) -> Op:
    """One step of ``rule`` (a name in ``RULES``) on ``numel`` elements; tables (8 bytes for 8,192 elements, some 60 for a
    tensor) are left out.

    For LAMB both passes with the sums between them, the sums' own few bytes left out.
    """
    kernel, _, flops = RULES[require_choice("rule", rule, RULES)]
    again = 12 * numel if kernel == "lamb" else 0
    n_bytes = (8 + grad_itemsize + copy_itemsize) * numel + 2 * state_bytes(rule, numel, eight_bit=eight_bit) + again
    launches = 3 if kernel == "lamb" else 1
    return Op(f"{kernel}_step", "optimizer", False, "fp32", flops * numel, n_bytes, launches=launches)
