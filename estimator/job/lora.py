"""``Lora``: low-rank adapters beside the frozen projections of a model (Hu et al. 2021), as PEFT users know them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from estimator.errors import InputError, invalid, require_choice, require_int
from estimator.job.fields import nearest

if TYPE_CHECKING:
    from estimator.job.model import ModelSpec
    from estimator.job.strategy import Strategy

LoraInit = Literal["kaiming", "gaussian"]

PARTS: dict[str, tuple[str, ...]] = {"attention": ("q", "k", "v", "out"), "mlp": ("gate", "up", "down")}
"""Projections of a block by its parts."""
_PART_OF = {name: part for part, names in PARTS.items() for name in names}
_ALL = ("all", "all-linear", "all_linear")
ALIASES: dict[str, str] = {
    **{f"{x}_proj": x for x in "qkv"}, "o_proj": "out", "out_proj": "out", "gate_proj": "gate", "up_proj": "up",
    "down_proj": "down", "fc1": "up", "fc2": "down",
}  # fmt: skip
"""What Hugging Face's models call them."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """``y = W x + scale * B A x`` for every targeted projection ``W``: A ``[rank, in]`` and B ``[out, rank]`` are trained, all other
    parameters of the model are frozen.

    Raises ``InputError`` when a field is out of range.
    """

    rank: int
    alpha: float = 0.0
    """``scale`` is ``alpha / rank``; 0: as much as ``rank``, so that it is 1."""
    dropout: float = 0.0
    """Share of the elements that each adapter's input loses in training."""
    targets: tuple[str, ...] = ("attention", "mlp")
    """Parts of a block (``attention``, ``mlp``, ``all``) or single projections of it (``q``, ``k``, ``v``, ``out``, ``gate``, ``up``,
    ``down``, or Hugging Face's names of them)."""
    rank_stabilized: bool = False
    """``scale`` is ``alpha / sqrt(rank)`` (Kalajdzievski 2023)."""
    init: LoraInit = "kaiming"
    """Initial values of A: uniform within ``1 / sqrt(in)`` (PEFT's default), or normal with a deviation of ``1 / rank``; B's are 0."""

    def __post_init__(self) -> None:
        require_int("model.lora.rank", self.rank)
        for field, most in (("alpha", float("inf")), ("dropout", 1.0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < most:
                raise invalid(f"model.lora.{field}", value, "at least 0" + (", below 1" if most == 1.0 else ""))
        require_choice("model.lora.init", self.init, get_args(LoraInit))
        if isinstance(self.targets, str) or not self.targets:
            raise invalid("model.lora.targets", self.targets, f"a list of {_ALLOWED}")
        object.__setattr__(self, "targets", _canonical(self.targets))
        object.__setattr__(self, "alpha", float(self.alpha or self.rank))
        object.__setattr__(self, "dropout", float(self.dropout))

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def adapts(self, name: str) -> bool:
        """Whether the parameter ``name`` of a block is the weight of a targeted projection."""
        part, _, rest = name.partition(".")
        projection = rest.removesuffix(".weight")
        if not rest.endswith(".weight") or _PART_OF.get(projection) != {"attn": "attention", "mlp": "mlp"}.get(part):
            return False
        return projection in self.targets or _PART_OF[projection] in self.targets


_ALLOWED = ", ".join((*PARTS, "all", *_PART_OF))


def _canonical(targets: tuple[str, ...]) -> tuple[str, ...]:
    """In a fixed order, one name for each projection, parts that are whole by their own."""
    chosen: set[str] = set()
    for name in targets:
        known = ALIASES.get(name, name) if isinstance(name, str) else name
        if known in _ALL:
            chosen |= PARTS.keys()
        elif known in PARTS or known in _PART_OF:
            chosen.add(known)
        else:
            near = nearest(str(name), (*PARTS, "all", *_PART_OF, *ALIASES))
            raise InputError(f"model.lora.targets has {name!r}; allowed: {_ALLOWED}{near}")
    for part, names in PARTS.items():
        if chosen.issuperset(names):
            chosen.add(part)
        if part in chosen:
            chosen -= set(names)
    return tuple(name for name in (*PARTS, *_PART_OF) if name in chosen)


def check_lora(spec: ModelSpec) -> None:
    """Raises ``InputError`` where ``spec.lora`` does not go with the other fields, or not yet."""
    lora = spec.lora
    if lora is None:
        return
    if "gate" in lora.targets and not spec.gated_mlp:
        raise InputError(f"model.lora.targets has 'gate', which the MLP of {spec.name} has not; allowed: mlp, up, down")
    for present, what in (
        (spec.traced is not None, "is a traced module, which has the adapters that it was traced with"),
        (spec.encoder is not None, "has an encoder"),
        (spec.experts is not None, "has a mixture of experts"),
        (spec.latent is not None, "has latent attention"),
        (spec.tower is not None and spec.tower.trained, "has a vision tower that is trained"),
    ):
        if present:
            raise InputError(f"model.lora is set, but {spec.name} {what}; allowed: decoders without")


def lora_notes(lora: Lora | None, n_trained: int, n_params: int) -> tuple[str, ...]:
    """For the report: how much of a model of ``n_params`` parameters adapters are."""
    if lora is None:
        return ()
    return (
        f"adapters of rank {lora.rank}: {n_trained:,} of {n_params:,} parameters are trained ({n_trained / n_params:.2%})",
    )


def check_lora_strategy(spec: ModelSpec, s: Strategy) -> None:
    """Raises ``InputError`` for what ``s`` has and adapters do not go with yet."""
    if spec.lora is None:
        return
    for present, what, allowed in (
        (s.framework != "zerocast", f"framework {s.framework!r}", "zerocast"),
        (s.tp > 1, f"tp {s.tp}", "1"),
        (s.pp > 1, f"pp {s.pp}", "1"),
        (s.matmul_dtype != "model", f"matmul_dtype {s.matmul_dtype!r}", "model"),
        (s.sparse_embeddings, "sparse_embeddings, of tables that have no gradients then", "false"),
    ):
        if present:
            raise InputError(f"model.lora is set with {what}; allowed: {allowed}")
