"""Operators that compress what collectives carry: the runtime's kernels, or the plain torch that they replace."""

from __future__ import annotations

from estimator.job.strategy import Dtype
from estimator.ops.kernels import adacomp, one_bit, quantize
from estimator.ops.operator import Op
from estimator.schedule.events import Pack, Unpack
from estimator.schedule.messages import message_bytes
from estimator.sharding.layout import ADACOMP_BIN, ADACOMP_SHARE, BLOCK_NUMEL
from estimator.units import DTYPE_BYTES

KERNEL_OF = {"int8": "quantize", "int4": "quantize", "one_bit": "one_bit", "adacomp": "adacomp"}
"""The kernel that does the work of a codec."""

_PLAIN_BYTES = {"int8": (85, 33), "int4": (95, 60), "one_bit": (90, 55), "adacomp": (100, 4)}
"""Bytes per element, and per element and piece, that packing and unpacking read and write in plain torch beside their input
and output: counted in the references of ``runtime.kernels``."""


def codec_op(event: Pack | Unpack, dtype: Dtype, kernels: frozenset[str]) -> Op:
    """The work of ``event`` on elements of ``dtype`` where ``kernels`` are in use."""
    packs, pieces = isinstance(event, Pack), event.pieces if isinstance(event, Unpack) else 1
    numel, width, block = event.numel, DTYPE_BYTES[dtype], BLOCK_NUMEL.get(event.codec, ADACOMP_BIN)
    if KERNEL_OF[event.codec] not in kernels:
        packing, unpacking = _PLAIN_BYTES[event.codec]
        op = Op(
            "compress", "elementwise", False, "fp32", 0.0, numel * (width + (packing if packs else unpacking * pieces))
        )
    elif event.codec == "adacomp":
        op, add = adacomp.cost(numel, block, dtype, width, numel // ADACOMP_SHARE)
        if not packs:  # the sum is set to zero, added to, and written back
            op = add._replace(n_bytes=pieces * add.n_bytes + numel * (8 + width), launches=pieces * add.launches + 2)
    elif event.codec == "one_bit":
        op = one_bit.cost(numel, block, dtype, width, pieces=pieces)[0 if packs else 1]
    else:
        op = quantize.cost(numel, event.codec, block, dtype, width, pieces=pieces)[0 if packs else 1]
    if isinstance(event, Pack) and event.rows > 1:  # codes are put in order: read and written once more, as two copies
        op = op._replace(
            n_bytes=op.n_bytes + 2 * sum(message_bytes(event.codec, numel).values()), launches=op.launches + 2
        )
    return op
