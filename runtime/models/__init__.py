"""Reference models, built from a ``ModelSpec``."""

from runtime.models.decoder import Decoder

__all__ = ["Decoder"]
