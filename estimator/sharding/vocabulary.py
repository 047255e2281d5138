"""The vocabulary as a framework holds it: filled up so that tensor-parallel ranks have equal, round parts."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from estimator.job.framework import FRAMEWORKS
from estimator.job.model import ModelSpec
from estimator.job.strategy import Strategy


@lru_cache(maxsize=256)
def with_padded_vocabulary(spec: ModelSpec, strategy: Strategy) -> ModelSpec:
    """``spec`` with the rows that embedding and output layer have where ``strategy``'s framework trains it."""
    multiple = FRAMEWORKS[strategy.framework].vocab_multiple * strategy.tp
    rows = -(-spec.vocab_size // multiple) * multiple if multiple else spec.vocab_size
    return spec if rows == spec.vocab_size else replace(spec, vocab_size=rows)
