"""Norm of the gradients and overflow check in one pass over many tensors; nothing is read back by the host.

Sums are fp32 within a chunk of 16,384 elements and fp64 above it, in a fixed order: the same bits every time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from estimator.errors import invalid
from estimator.ops.kernels.chip import Tile
from estimator.ops.kernels.grad_norm import UNROLL, chunk_elements
from runtime.kernels import loader
from runtime.kernels.loader import Kernel, chip, kernel, launch, type_name, widened
from runtime.kernels.tables import check_lists, table_of

_SUM_THREADS = 1024


def squares(tensors: Sequence[Tensor]) -> Tensor:
    """fp32 ``[2]`` on the tensors' device: the sum of squares of all elements; 1 if one of them is infinite or NaN, else 0.

    ``tensors`` contiguous, bf16, fp16 or fp32, one dtype. Results of several calls and ranks may be added up: the second
    number stays zero as long as all elements are finite. A chunk whose squares sum to more than 3.4e38 makes the first infinite.
    """
    _check_some(tensors)
    if not loader.uses_kernel("grad_norm", tensors[0]):
        return squares_reference(tensors)
    return _squares(tensors)


def squares_reference(tensors: Sequence[Tensor]) -> Tensor:
    """``squares`` in plain torch (fp64 for fp64 tensors)."""
    _check_some(tensors)
    check_lists({"tensors": tensors})
    wide = [widened(tensor) for tensor in tensors]
    total = torch.stack([w.square().sum(dtype=torch.float64) for w in wide]).sum().to(wide[0].dtype)
    finite = torch.stack([w.isfinite().all() for w in wide]).all()
    return torch.stack((total, 1 - finite.to(total.dtype)))


def _check_some(tensors: Sequence[Tensor]) -> None:
    if not tensors:
        raise invalid("number of tensors", 0, "at least one")


def gradient_factor(squares: Tensor, inverse: float | Tensor, max_norm: float = 0.0) -> Tensor:
    """fp32 ``[1]``: what an optimizer step multiplies gradients by, from the sum of squares of the scaled ones.

    ``inverse``: 1 / (loss scale x ranks). With ``max_norm`` above 0 also the clipping to that norm, as
    ``torch.nn.utils.clip_grad_norm_`` does it.
    """
    norm = squares[:1].sqrt() * inverse
    return ((max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else torch.ones_like(norm)) * inverse


# ---- launcher ---------------------------------------------------------------------------------------------------------


@functools.cache
def _compiled(dtype: torch.dtype, tile: Tile) -> tuple[Kernel, Kernel, int]:
    """The kernel of chunks, the kernel of their sum, elements of a chunk."""
    pack, chunk = 16 // dtype.itemsize, chunk_elements(tile, dtype.itemsize)
    chunks = kernel(
        "grad_norm", "chunk_squares", X_TYPE=type_name(dtype), LISTS=1, PACK=pack, THREADS=tile.threads, UNROLL=UNROLL,
        CHUNK=chunk,
    )  # fmt: skip
    total = kernel(
        "grad_norm", "total_squares", X_TYPE="f32", LISTS=1, PACK=1, THREADS=_SUM_THREADS, UNROLL=1, CHUNK=_SUM_THREADS
    )
    return chunks, total, chunk


def _launch(tensors: Sequence[Tensor]) -> Tensor:
    device, dtype = tensors[0].device, tensors[0].dtype
    tile = chip(device).tile
    chunks, total, chunk = _compiled(dtype, tile)
    table = table_of({"tensors": tensors}, chunk=chunk, pack=16 // dtype.itemsize)
    partial = torch.empty(table.n_chunks, 2, dtype=torch.float32, device=device)
    out = torch.empty(2, dtype=torch.float32, device=device)
    launch(chunks, table.n_chunks, tile.threads, table.values, table.n_chunks, partial)
    launch(total, 1, _SUM_THREADS, partial, table.n_chunks, out)
    return out


_squares = loader.outside_compile(_launch)
