"""``Patches``: what a vision transformer reads in place of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimator.errors import InputError, invalid, require_int

if TYPE_CHECKING:
    from estimator.job.model import ModelSpec
    from estimator.job.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Patches:
    """Square images, cut into square patches, each of which is projected to a token; one more token, which is learned, is what
    the image's class is read from (Dosovitskiy et al. 2021, section 3.1).

    Raises ``InputError`` when a field is out of range.
    """

    image_size: int
    """Pixels of a side."""
    patch_size: int
    channels: int = 3

    def __post_init__(self) -> None:
        for field in ("image_size", "patch_size", "channels"):
            require_int(f"model.patches.{field}", getattr(self, field))
        if self.image_size < self.patch_size:
            raise invalid("model.patches.patch_size", self.patch_size, f"at most image_size = {self.image_size}")

    @property
    def n_patches(self) -> int:
        """Of one image; what is left at its edges is not read."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def n_tokens(self) -> int:
        return self.n_patches + 1

    @property
    def patch_numel(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.patch_size**2


def check_patches(spec: ModelSpec) -> None:
    """Raises ``InputError`` where ``spec.patches`` and the other fields contradict each other."""
    if spec.patches is None:
        return
    encoder = spec.encoder
    if encoder is None or encoder.n_layers or encoder.token_types:
        raise InputError("model.patches are set; allowed: with an encoder alone, without token_types")
    rows = spec.patches.n_tokens
    if spec.position_rows != rows or spec.max_positions != rows:
        raise InputError(
            f"model.position_rows is {spec.position_rows} and max_positions {spec.max_positions}; allowed: {rows} each, one for "
            "every patch and one"
        )
    if not spec.pre_norm or spec.embedding_norm or spec.tied_embeddings:
        raise InputError(
            "model.patches are set with norms after the residual, an embedding_norm or tied_embeddings; allowed: neither"
        )


def check_images(spec: ModelSpec, w: Workload) -> None:
    """Raises ``InputError`` where sequences are not those of an image."""
    if spec.patches is not None and w.seq_len != spec.patches.n_tokens:
        raise InputError(
            f"seq_len is {w.seq_len}; allowed: {spec.patches.n_tokens}, the patches of an image of {spec.name} and one token more"
        )
