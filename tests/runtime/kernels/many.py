"""Lists of tensors for the kernels that take many at once, on the shim or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from runtime.kernels.loader import Kernel
from tests.runtime.kernels.checks import Recorder, at_offset, needs_shim, on_shim

DEVICES = [
    pytest.param("cpu", marks=needs_shim),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
    ),
]
"""``cpu``: kernels run on the shim."""

SIZES = (5, 0, 10_001, 1, 8192, 300, 2048)


@contextmanager
def running(device: str, order: int = 0) -> Iterator[Recorder | None]:
    """Kernels do the work on tensors of ``device``."""
    if device == "cuda":
        yield None
        return
    with on_shim(order) as record:
        yield record


def randoms(
    sizes: Sequence[int], dtype: torch.dtype = torch.float32, device: str = "cpu", *, seed: int = 0,
    offsets: Sequence[int] = (0,),
) -> list[Tensor]:  # fmt: skip
    """Normal numbers; tensor i starts ``offsets[i % len(offsets)]`` elements past a 16-byte boundary."""
    generator = torch.Generator().manual_seed(seed)
    return [
        at_offset(torch.randn(n, generator=generator).to(dtype).to(device), offsets[i % len(offsets)])
        for i, n in enumerate(sizes)
    ]


def clones(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    return [tensor.clone() if dtype is None else tensor.to(dtype, copy=True) for tensor in tensors]


def table_sizes(kernel: Kernel, table: Tensor, n_chunks: int) -> list[int]:
    """Elements of each tensor of a launch, as its table has them."""
    lists = dict(kernel.defines)["LISTS"]
    assert isinstance(lists, int)
    records = table[n_chunks:].view(-1, 3 + lists)
    assert torch.equal(table[:n_chunks].bincount(minlength=len(records)).cumsum(0)[:-1], records[1:, 2])
    return records[:, 0].tolist()
