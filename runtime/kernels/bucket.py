"""Many tensors into one flat bucket and back, with conversion and scaling on the way; scaling in place is the same kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from estimator.errors import invalid
from estimator.ops.kernels.bucket import chunk_elements
from estimator.ops.kernels.chip import Tile
from runtime.kernels import loader
from runtime.kernels.loader import Kernel, chip, kernel, launch, type_name, widened
from runtime.kernels.tables import Lists, check_lists, table_of


def flatten(tensors: Sequence[Tensor], bucket: Tensor, factor: Tensor | None = None) -> None:
    """Writes the tensors one after another to the front of ``bucket``, times ``factor``, in its dtype.

    ``tensors`` contiguous, of one dtype; ``bucket`` ``[at least their elements]``; each bf16, fp16 or fp32; ``factor`` fp32 of one
    element on their device. Computed in fp32, rounded once. Raises ``InputError`` for a bucket that is too small.
    """
    copy_scaled(tensors, bucket_views(bucket, tensors), factor)


def flatten_reference(tensors: Sequence[Tensor], bucket: Tensor, factor: Tensor | None = None) -> None:
    """``flatten`` in plain torch."""
    copy_scaled_reference(tensors, bucket_views(bucket, tensors), factor)


def unflatten(bucket: Tensor, tensors: Sequence[Tensor], factor: Tensor | None = None) -> None:
    """``flatten`` the other way: fills ``tensors`` from the front of ``bucket``."""
    copy_scaled(bucket_views(bucket, tensors), tensors, factor)


def unflatten_reference(bucket: Tensor, tensors: Sequence[Tensor], factor: Tensor | None = None) -> None:
    """``unflatten`` in plain torch."""
    copy_scaled_reference(bucket_views(bucket, tensors), tensors, factor)


def scale_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiplies contiguous tensors of one dtype by ``factor``, fp32 of one element on their device, in place."""
    copy_scaled(tensors, tensors, factor)


def scale_reference_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """``scale_`` in plain torch."""
    copy_scaled_reference(tensors, tensors, factor)


def copy_scaled(sources: Sequence[Tensor], targets: Sequence[Tensor], factor: Tensor | None = None) -> None:
    """``targets[i] = sources[i] * factor``: contiguous, of the same sizes, one dtype to a list; they may be the same tensors."""
    _check_factor(factor)
    lists = {"targets": targets, "sources": sources}
    if not sources or not targets:
        return check_lists(lists)
    if not loader.uses_kernel("bucket", sources[0]):
        check_lists(lists)
        return _copy_in_torch(sources, targets, factor)
    _copy(lists, factor)


def copy_scaled_reference(sources: Sequence[Tensor], targets: Sequence[Tensor], factor: Tensor | None = None) -> None:
    """``copy_scaled`` in plain torch."""
    _check_factor(factor)
    check_lists({"targets": targets, "sources": sources})
    _copy_in_torch(sources, targets, factor)


def bucket_views(bucket: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """For each tensor its part of ``bucket``, one after another from the front."""
    sizes = [tensor.numel() for tensor in tensors]
    if bucket.ndim != 1 or sum(sizes) > bucket.numel():
        raise invalid("shape of the bucket", tuple(bucket.shape), f"[at least {sum(sizes)}]")
    return list(bucket.detach()[: sum(sizes)].split(sizes)) if sizes else []


def _check_factor(factor: Tensor | None) -> None:
    if factor is not None and (factor.dtype != torch.float32 or factor.numel() != 1):
        raise invalid("factor", f"{factor.dtype} of {factor.numel()} elements", "fp32 of one element")


@torch.no_grad()
def _copy_in_torch(sources: Sequence[Tensor], targets: Sequence[Tensor], factor: Tensor | None) -> None:
    for source, target in zip(sources, targets, strict=True):
        wide = widened(source)
        target.copy_((wide if factor is None else wide * factor.to(wide.dtype)).view(target.shape))


# ---- launcher ---------------------------------------------------------------------------------------------------------


class _Shape:
    """How a block goes over its elements."""

    def __init__(self, types: tuple[torch.dtype, torch.dtype], tile: Tile) -> None:
        widest = max(dtype.itemsize for dtype in types)
        self.pack, self.chunk = 16 // widest, chunk_elements(tile, widest)
        self.threads, self.unroll = tile.threads, tile.unroll


@functools.cache
def _shape(types: tuple[torch.dtype, torch.dtype], tile: Tile) -> _Shape:
    return _Shape(types, tile)


@functools.cache
def _kernel(types: tuple[torch.dtype, torch.dtype], tile: Tile) -> Kernel:
    shape = _shape(types, tile)
    return kernel(
        "bucket", "bucket_copy", X_TYPE=type_name(types[0]), Y_TYPE=type_name(types[1]), LISTS=2, PACK=shape.pack,
        THREADS=shape.threads, UNROLL=shape.unroll, CHUNK=shape.chunk,
    )  # fmt: skip


def _launch(lists: Lists, factor: Tensor | None) -> None:
    tile, types = chip(lists["sources"][0].device).tile, (lists["sources"][0].dtype, lists["targets"][0].dtype)
    shape = _shape(types, tile)
    table = table_of(lists, chunk=shape.chunk, pack=shape.pack)
    launch(_kernel(types, tile), table.n_chunks, shape.threads, table.values, table.n_chunks, factor)


_copy = loader.outside_compile(_launch)
