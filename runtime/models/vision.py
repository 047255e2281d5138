"""The reference vision transformer (Dosovitskiy et al. 2021), trained on classes of images.

``estimator.ops.vision`` mirrors every ``forward`` here. Shapes: B batch, S places (patches and one), D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from estimator.errors import InputError
from estimator.job.model import ModelSpec
from estimator.job.patches import Patches
from runtime import functional
from runtime.models.decoder import initial_values, make_norm
from runtime.models.encoder import EncoderBlock


class PatchEmbedding(nn.Module):
    """Patches of images ``[B, C, H, W]``, behind a learned token, with a learned vector for each place: ``[B, S, D]``."""

    def __init__(self, spec: ModelSpec, patches: Patches) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(1, 1, spec.d_model))
        self.positions = nn.Parameter(torch.zeros(1, patches.n_tokens, spec.d_model))
        self.project = nn.Conv2d(patches.channels, spec.d_model, patches.patch_size, patches.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        x = self.project(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(images), -1, -1), x], dim=1)
        return x + self.positions


class ClassHead(nn.Module):
    """Norm and projection of the first token, mean cross-entropy: ``[B, S, D]`` to a scalar."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm = make_norm(spec) if spec.final_norm else nn.Identity()
        self.out = nn.Linear(spec.d_model, spec.vocab_size, bias=spec.head_bias)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """``labels``: int64 ``[B]``."""
        first = x[:, 0].clone(memory_format=torch.contiguous_format)  # not a view, which would keep all of x
        h = self.norm(first)  # a norm is each token's own: those of the others need not be made
        return functional.linear_cross_entropy(h, self.out.weight, self.out.bias, labels)


class VisionModel(nn.Module):
    """``forward(images, labels)`` gives the mean loss of the batch."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.patches is not None
        self.spec, self.patches = spec, spec.patches
        self.embed = PatchEmbedding(spec, spec.patches)
        self.blocks = nn.ModuleList(EncoderBlock(spec) for _ in range(spec.n_layers))
        self.head = ClassHead(spec)

    def reset_parameters(self, seed: int = 0, std: float = 0.02) -> None:
        """As ``Decoder.reset_parameters``."""
        fill = initial_values(self.head.out.weight.device, seed, std)
        for name, param in self.named_parameters():
            fill(name, param)

    def fill_tables(self) -> None:
        """There are none."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        size = self.patches.image_size
        if images.shape[1:] != (self.patches.channels, size, size):
            raise InputError(
                f"images are {list(images.shape[1:])}; allowed: [{self.patches.channels}, {size}, {size}], channels and pixels"
            )
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x, labels)
