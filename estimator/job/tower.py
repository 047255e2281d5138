"""``Tower``: what an image-text model holds beside its decoder while it is trained on text alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from estimator.errors import InputError, require_int
from estimator.job.framework import FRAMEWORKS

if TYPE_CHECKING:
    from estimator.job.model import ModelSpec
    from estimator.job.strategy import Strategy


class HeldParam(NamedTuple):
    """One parameter tensor."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A vision tower and the projector behind it. Images are not read: their parameters, and where ``trained`` gradients and
    optimizer states of them, take memory and nothing else.

    Raises ``InputError`` when a field is out of range.
    """

    kind: str
    """The tower's ``model_type``, e.g. ``"siglip"``."""
    n_layers: int
    layer: tuple[HeldParam, ...]
    """Of one of its layers, which are alike."""
    others: tuple[HeldParam, ...]
    """In front of and behind its layers, the projector included."""
    trained: bool = False
    """Held as trained parameters are: as where the optimizer steps all of a flat buffer. False: frozen."""

    def __post_init__(self) -> None:
        require_int("model.tower.n_layers", self.n_layers)
        for field in ("layer", "others"):
            for param in getattr(self, field):
                for size in param.shape:
                    require_int(f"model.tower.{field}.{param.name}", size)

    @property
    def numel(self) -> int:
        """Numbers in all of it."""
        return self.n_layers * _numel(self.layer) + _numel(self.others)


def _numel(params: tuple[HeldParam, ...]) -> int:
    return sum(prod(param.shape) for param in params)


def with_tower(spec: ModelSpec, *, trained: bool) -> ModelSpec:
    """``spec`` with its vision tower ``trained``. Raises ``InputError`` where it has none to train."""
    if not trained:
        return spec
    if spec.tower is None:
        raise InputError(f"train_tower is True, but {spec.name} has no vision tower; allowed: false")
    return replace(spec, tower=replace(spec.tower, trained=True))


def check_tower(spec: ModelSpec) -> None:
    """Raises ``InputError`` where ``spec.tower`` does not go with the other fields."""
    if spec.tower is None:
        return
    for present, what in (
        (spec.encoder is not None, "an encoder"),
        (spec.traced is not None, "a trace"),
        (spec.lora is not None and spec.tower.trained, "adapters, beside which everything is frozen"),
    ):
        if present:
            raise InputError(f"model {spec.name} has a vision tower with {what}; allowed: a decoder without")


def tower_notes(spec: ModelSpec) -> list[str]:
    """What people should know of a forecast with a vision tower."""
    if spec.tower is None:
        return []
    held = "held as trained parameters that no gradient reaches" if spec.tower.trained else "held frozen"
    return [
        f"trained on text alone: the vision tower and its projector ({spec.tower.numel:,} parameters) are {held}, no image is read"
    ]


def check_tower_strategy(spec: ModelSpec, s: Strategy) -> None:
    """Raises ``InputError`` where ``s`` and ``spec.tower`` do not go together."""
    if spec.tower is not None and spec.tower.trained and FRAMEWORKS[s.framework].units != "groups":
        raise InputError(
            f"model.tower.trained is True with framework {s.framework}, where parameters without gradients have no optimizer states; "
            "allowed: false"
        )
