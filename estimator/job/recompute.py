"""What a ``Strategy`` may say about activations: which are made again in the backward pass, which wait in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from estimator.errors import InputError, invalid, require_int, unknown_choice

if TYPE_CHECKING:
    from estimator.job.strategy import Strategy

Recompute = Literal["none", "selective", "full"]
"""Ways that concern a block as a whole."""

Part = Literal["activation", "attention", "core_attention", "mlp", "norms"]
PARTS: tuple[str, ...] = get_args(Part)
"""Parts of a block that can be recomputed apart. ``attention``, its softmax and products alone (``core_attention``, the
selective recomputation of Korthikanti et al. 2022) and ``mlp`` keep what goes into them and run again; the outputs of ``norms`` and of the MLP's ``activation`` are made again from what their own backward passes keep in any case."""

SUBMODULE_PARTS = frozenset(("attention", "core_attention", "mlp"))
PART_OF = {"activation": "mlp", "core_attention": "attention"}
"""Parts that another part contains."""


def parts_of(recompute: str) -> frozenset[str]:
    """The parts that ``recompute`` names; none where it concerns whole blocks."""
    return frozenset() if recompute in get_args(Recompute) else frozenset(recompute.split(","))


def canonical(recompute: object) -> str:
    """``recompute`` under its one name: parts in alphabetical order, without what another part contains.

    Raises ``InputError``.
    """
    whole = get_args(Recompute)
    if not isinstance(recompute, str):
        raise unknown_choice("recompute", recompute, (*whole, *PARTS))
    if recompute in whole:
        return recompute
    names = [name.strip() for name in recompute.split(",")]
    for name in names:
        if name in whole:
            raise InputError(
                f"recompute is {recompute!r}; allowed: {', '.join(whole)} alone, or parts of a block ({', '.join(PARTS)}) "
                "joined by commas"
            )
        if name not in PARTS:
            raise unknown_choice("recompute", name, (*whole, *PARTS))
    return ",".join(sorted({name for name in names if PART_OF.get(name) not in names}))


def check_recompute(s: Strategy) -> None:
    """Checks the fields about activations, and brings them under one name each. Raises ``InputError``."""
    object.__setattr__(s, "recompute", canonical(s.recompute))
    require_int("recompute_every", s.recompute_every)
    if s.recompute == "none":
        object.__setattr__(s, "recompute_every", 1)  # every block does nothing
    if not isinstance(s.activation_offload, bool):
        raise invalid("activation_offload", s.activation_offload, "true or false")
    if s.activation_offload and s.recompute not in ("selective", "full"):
        raise InputError(
            f"activation_offload is on with recompute {s.recompute!r}; allowed: only with recompute 'full' or 'selective', whose "
            "blocks' inputs it sends to host memory"
        )
    if s.activation_offload and s.pp > 1:
        raise InputError(
            f"activation_offload is on with pp {s.pp}; allowed: 1, as every pass needs its own host memory"
        )
