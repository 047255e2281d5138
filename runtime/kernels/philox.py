"""Counter-based random numbers of the dropout kernels, in plain torch: the same bits as ``philox.cuh``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from estimator.errors import invalid

_LOW = 0xFFFFFFFF
_STEPS = 1 << 16


class Dropout(NamedTuple):
    """Dropout with a probability in whole steps of 2^-16, so that the kept elements' factor is exact."""

    threshold: int
    """Elements whose 16 random bits are below it are dropped."""

    @property
    def scale(self) -> float:
        """Factor of the kept elements, 1 / (1 - probability)."""
        return _STEPS / (_STEPS - self.threshold)


def dropout_of(probability: float) -> Dropout:
    """Nearest step. Raises ``InputError`` unless 0 <= ``probability`` < 1."""
    if not 0 <= probability < 1:
        raise invalid("dropout probability", probability, "a number of at least 0 and below 1")
    return Dropout(min(round(probability * _STEPS), _STEPS - 1))


def draw_seed(device: torch.device) -> Tensor:
    """A fresh key, int64 ``[1]``, from torch's generator of ``device``: follows ``torch.manual_seed``, checkpointed random
    state and CUDA graphs (each replay draws anew)."""
    return torch.empty(1, dtype=torch.int64, device=device).random_()


def random_bits(numel: int, seed: Tensor) -> Tensor:
    """16 random bits of each of ``numel`` elements, ``[numel]`` int64 on ``seed``'s device."""
    counter = torch.arange(-(-numel // 8), dtype=torch.int64, device=seed.device)
    c0, c1 = counter & _LOW, counter >> 32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wraps like an unsigned 64-bit product
        c0, c1, c2, c3 = (b >> 32 & _LOW) ^ c1 ^ k0, b & _LOW, (a >> 32 & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    words = torch.stack((c0, c1, c2, c3), dim=1)
    return torch.stack((words & 0xFFFF, words >> 16), dim=2).flatten()[:numel]


def factors(numel: int, dropout: Dropout, seed: Tensor) -> Tensor:
    """``dropout.scale`` for kept and 0 for dropped elements, ``[numel]`` fp32 on ``seed``'s device."""
    return (random_bits(numel, seed) >= dropout.threshold).float() * dropout.scale
