"""Names of the runtime's CUDA kernels, and which of them work on a device."""

from __future__ import annotations

from collections.abc import Iterable

KERNELS: dict[str, str] = {
    "rms_norm": "RMSNorm, with residual addition and dropout before it",
    "layer_norm": "LayerNorm, with residual addition and dropout before it",
    "gated_activation": "activation(gate) * up",
    "activation": "activation(x + bias)",
    "rotary": "rotary position embedding",
    "dropout_residual": "residual + dropout(x)",
    "cross_entropy": "softmax cross-entropy over the vocabulary",
    "linear_cross_entropy": "head and cross-entropy in chunks of rows",
    "quantize": "blockwise int8, int4 and fp8, and sums of what was received",
    "adacomp": "AdaComp selection and packing of gradients",
    "one_bit": "signs of gradients with a scale per block",
    "adam": "Adam and AdamW steps over many tensors",
    "sgd": "SGD steps with momentum over many tensors",
    "lion": "Lion steps over many tensors",
    "adagrad": "Adagrad steps over many tensors",
    "lamb": "LAMB steps over many tensors",
    "grad_norm": "sum of squares of many tensors and overflow check",
    "bucket": "many tensors copied into a flat one and back, or scaled",
}
"""Name of every kernel that can be switched off, and what it computes."""

ARCHITECTURES = {"volta": 70, "ampere": 80, "ada": 89, "hopper": 90, "blackwell": 100}
"""GPUs that the kernels run on: name of the architecture and its compute capability, major * 10 + minor."""

NONE: frozenset[str] = frozenset()


def kernels_in_use(arch: str, off: Iterable[str] = ()) -> frozenset[str]:
    """Kernels that work on a device of architecture ``arch`` when those in ``off`` (``"all"``: every one) are switched off."""
    names = set(off)
    return NONE if arch not in ARCHITECTURES or "all" in names else frozenset(KERNELS.keys() - names)
