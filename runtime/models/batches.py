"""Random batches for a model that is trained only to be measured."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from estimator.job.model import ModelSpec
from runtime.kernels.cross_entropy import DEFAULTS

MASKED_EVERY = 7
"""One token in so many is masked: 14%, where BERT masks 15% (Devlin et al. 2019, section 3.1)."""


def random_batch(spec: ModelSpec, draw: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs of ``spec``'s model, ``ids`` and ``labels``; ``draw`` makes random tokens ``[B, S]`` int64.

    An encoder alone predicts its masked tokens; others predict all labels.
    """
    ids, labels = draw(), draw()
    if spec.encoder is not None and not spec.encoder.n_layers:
        ids[:, ::MASKED_EVERY] = 0
        for first in range(1, MASKED_EVERY):
            labels[:, first::MASKED_EVERY] = DEFAULTS.ignore_index
    return ids, labels
