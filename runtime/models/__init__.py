"""Reference models, built from a ``ModelSpec``."""

from __future__ import annotations

from estimator.errors import InputError
from estimator.job.model import ModelSpec
from runtime.models.decoder import Decoder
from runtime.models.encoder import EncoderModel
from runtime.models.encoder_decoder import EncoderDecoder
from runtime.models.stage import DecoderStage
from runtime.models.vision import VisionModel
from runtime.parallel.layers import WholeLayers

__all__ = ["Decoder", "DecoderStage", "EncoderDecoder", "EncoderModel", "VisionModel", "build"]

Model = Decoder | EncoderModel | EncoderDecoder | VisionModel


def build(spec: ModelSpec, seq_len: int | None = None, layers: WholeLayers | None = None) -> Model:
    """The model that ``spec`` describes: ``model(ids, labels)`` gives the mean loss of a batch.

    ``seq_len`` (default ``spec.max_positions``) is its longest sequence; ``layers``: how ranks share a decoder's. Raises
    ``InputError`` for what cannot be run.
    """
    if spec.traced is not None:
        raise InputError(
            f"{spec.name} is a traced module, of which there are records alone; runtime.initialize trains the module"
        )
    if spec.patches is not None:
        return VisionModel(spec)
    if spec.encoder is None:
        return Decoder(spec, seq_len, layers)
    return EncoderDecoder(spec, seq_len) if spec.encoder.n_layers else EncoderModel(spec, seq_len)
