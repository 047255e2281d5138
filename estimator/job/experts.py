"""``Experts``: the shape of a mixture of experts in place of a decoder's MLP, and how tokens choose among them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from estimator.errors import InputError, invalid, require_choice, require_int

if TYPE_CHECKING:
    from estimator.job.model import ModelSpec
    from estimator.job.strategy import Strategy

Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Gated MLPs of which every token passes through ``per_token``, chosen by a router, and a shared one beside them.

    Raises ``InputError`` when a field is out of range or two fields contradict each other.
    """

    n_experts: int
    per_token: int
    """Experts that each token chooses."""
    d_ff: int
    """Hidden width of one expert."""
    shared_d_ff: int = 0
    """Hidden width of the MLP that every token passes through too (DeepSeek: that of all shared experts together); 0: none."""
    shared_gate: bool = False
    """The shared MLP's result is multiplied by a sigmoid of one more projection (Qwen2-MoE)."""
    first_layer: int = 0
    """Layers before this one (0-based) have the dense MLP of ``ModelSpec.d_ff``."""
    every: int = 1
    """From ``first_layer`` on every so-manieth layer has experts, the others the dense MLP."""
    scoring: Scoring = "softmax"
    """What a router's projection becomes: shares of all experts (Mixtral), or a score for each (DeepSeek-V3)."""
    normalise: bool = True
    """A token's scores of the experts that it has chosen are divided by their sum."""
    scale: float = 1.0
    """What these are then multiplied by."""
    n_groups: int = 1
    """Groups of consecutive experts; a token chooses in its ``groups_per_token`` best ones only (DeepSeek)."""
    groups_per_token: int = 1
    selection_bias: bool = False
    """A number for each expert is added to its score for choosing only (DeepSeek-V3). Nothing trains it."""
    router_bias: bool = False
    """The router's projection has a bias (GPT-OSS)."""
    bias: bool = False
    """The experts' projections have biases (GPT-OSS)."""
    clamp: float = 0.0
    """Bound on gate and other projection in GPT-OSS's activation ``(up + 1) * gate * sigmoid(1.702 * gate)``; 0: the model's own."""
    capacity_factor: float = 0.0
    """An expert takes at most this many times its even share of a micro-batch's choices, the first choices and the first tokens
    first; the others are dropped. 0: dropless."""
    balance_loss: float = 0.0
    """Coefficient of the load-balance loss (Fedus et al. 2022, equation 4) of each layer with experts."""

    def __post_init__(self) -> None:
        for field in ("n_experts", "per_token", "d_ff", "every", "n_groups", "groups_per_token"):
            require_int(f"model.experts.{field}", getattr(self, field))
        for field in ("shared_d_ff", "first_layer"):
            require_int(f"model.experts.{field}", getattr(self, field), minimum=0)
        require_choice("model.experts.scoring", self.scoring, get_args(Scoring))
        for field in ("scale", "clamp", "capacity_factor", "balance_loss"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise invalid(f"model.experts.{field}", value, "a finite number >= 0")
        if self.n_experts % self.n_groups:
            raise invalid("model.experts.n_groups", self.n_groups, f"a divisor of n_experts = {self.n_experts}")
        if self.groups_per_token > self.n_groups:
            raise invalid(
                "model.experts.groups_per_token", self.groups_per_token, f"at most n_groups = {self.n_groups}"
            )
        reachable = self.n_experts // self.n_groups * self.groups_per_token
        if self.per_token > reachable:
            raise invalid("model.experts.per_token", self.per_token, f"at most {reachable}, the experts within reach")
        if self.shared_gate and not self.shared_d_ff:
            raise InputError("model.experts.shared_gate is True with shared_d_ff = 0; a gate needs a shared expert")

    def in_layer(self, layer: int) -> bool:
        """Whether ``layer`` (0-based) has experts."""
        return layer >= self.first_layer and (layer - self.first_layer) % self.every == 0

    def capacity(self, n_tokens: int) -> int:
        """Slots of one expert for a micro-batch of ``n_tokens``; 0 when dropless."""
        return math.ceil(self.capacity_factor * n_tokens * self.per_token / self.n_experts)

    def slots(self, n_tokens: int) -> int:
        """Rows of the buffers in which ``n_tokens`` lie expert by expert; with a capacity the last one is where dropped ones go."""
        capacity = self.capacity(n_tokens)
        return self.n_experts * capacity + 1 if capacity else n_tokens * self.per_token

    def arriving(self, n_rows: int, imbalance: float) -> int:
        """Rows that come to a rank to which ``imbalance`` times its share of all ranks' ``n_rows`` each goes (dropless)."""
        return math.ceil(n_rows * imbalance)


def check_expert_parallel(s: Strategy) -> None:
    """Raises ``InputError`` for fields of ``s`` that do not go with its ``ep``."""
    value = s.expert_imbalance
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
        raise invalid("expert_imbalance", value, "a number >= 1 (1: all ranks equally)")
    if s.ep == 1:
        object.__setattr__(s, "expert_imbalance", 1.0)  # all experts are on every rank
    elif value > s.ep:
        raise invalid(
            "expert_imbalance",
            value,
            f"a number from 1 (all ranks equally) to ep = {s.ep} (all choices fall on one rank)",
        )
    for field, none in (
        ("shard_size", 0), ("secondary_shard", 0), ("quantized_weights", False), ("quantized_grads", 0), ("grad_compression", "none"),
    ):  # fmt: skip
        if s.ep > 1 and getattr(s, field) != none:
            raise InputError(f"ep is {s.ep} with {field} {getattr(s, field)!r}; allowed: one of the two")


def check_expert_strategy(model: ModelSpec, s: Strategy) -> None:
    """Raises ``InputError`` where ranks cannot share ``model``'s experts as ``s`` says."""
    experts = model.experts
    if experts is not None and s.tp > 1:
        _check_tensor(model.name, experts, s.tp)
    if s.ep == 1:
        return
    if experts is None:
        raise InputError(f"ep is {s.ep}, but {model.name} has no experts; allowed: 1")
    if experts.n_experts % s.ep:
        raise InputError(f"ep is {s.ep}; allowed: a divisor of the {experts.n_experts} experts of {model.name}")
    if experts.capacity_factor and s.expert_imbalance != 1:
        raise InputError(
            f"expert_imbalance is {s.expert_imbalance} with capacity_factor {experts.capacity_factor}, where ranks exchange as many "
            "rows whatever the router does; allowed: 1"
        )


def _check_tensor(model: str, experts: Experts, tp: int) -> None:
    for field in ("d_ff", "shared_d_ff"):
        if getattr(experts, field) % tp:
            raise InputError(
                f"tp is {tp}; allowed: a divisor of experts.{field} = {getattr(experts, field)} of {model}"
            )
    if experts.bias:
        raise InputError(f"tp is {tp}, but the experts of {model} have biases, which tp does not share; allowed: 1")


def expert_notes(model: ModelSpec, s: Strategy, n_data: int) -> list[str]:
    """What people should know of a forecast with experts that ranks share."""
    notes = []
    if s.ep > 1 and model.experts is not None and not model.experts.capacity_factor:
        notes.append(
            f"the router decides how many rows come to a GPU's experts: the forecast is of one that gets {s.expert_imbalance:g} times the "
            "mean (expert_imbalance)"
        )
    if s.ep == n_data and s.ep > 1 and s.zero_stage:
        notes.append(
            f"with ep {s.ep} no two GPUs hold the same experts: their states are not sharded, and ZeRO {s.zero_stage} runs as 0 there"
        )
    return notes
