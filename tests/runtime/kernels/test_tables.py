"""Tables of many tensors."""

from __future__ import annotations

import pytest
import torch

from estimator.errors import InputError
from estimator.ops.kernels.tables import n_chunks, table_bytes
from runtime.context import metered_by
from runtime.kernels.tables import table_of
from runtime.ledger import Ledger
from tests.runtime.kernels.many import randoms


def test_a_table_by_hand() -> None:
    a = randoms((10, 0, 3), offsets=(0, 0, 1))
    b = randoms((10, 0, 3), torch.bfloat16, offsets=(4, 0, 2))
    side = [torch.zeros(1) for _ in a]
    table = table_of({"a": a, "b": b}, {"side": side}, chunk=8, pack=4)
    records = table.values[table.n_chunks :].view(3, 6).tolist()
    assert table.values[: table.n_chunks].tolist() == [0, 0, 2]
    assert (table.n_chunks, table.n_tensors) == (3, 3)
    assert [record[:3] for record in records] == [[10, 0, 0], [0, 0, 2], [3, -1, 2]]  # 1 and 2 past an access differ
    assert [record[3:] for record in records] == [[t.data_ptr() for t in row] for row in zip(a, b, side, strict=True)]


def test_tensors_that_start_equally_far_from_an_access_get_whole_ones() -> None:
    a = randoms((8, 8), offsets=(3, 0))
    b = randoms((8, 8), torch.bfloat16, offsets=(7, 4))
    shifted = table_of({"a": a, "b": b}, chunk=8, pack=4)
    assert shifted.values[shifted.n_chunks :].view(2, 5)[:, 1].tolist() == [3, 0]
    assert shifted.values[: shifted.n_chunks].tolist() == [0, 0, 1]  # three elements of the first chunk lie before a[0]
    from_start = table_of({"a": a, "b": b}, chunk=8, pack=4, from_start=True)
    assert from_start.values[from_start.n_chunks :].view(2, 5)[:, 1].tolist() == [-1, 0]
    assert from_start.values[: from_start.n_chunks].tolist() == [0, 1]


def test_the_same_tensors_share_a_table() -> None:
    a = randoms((8, 9))
    assert table_of({"a": a}, chunk=8, pack=4) is table_of({"a": list(a)}, chunk=8, pack=4)
    assert table_of({"a": a}, chunk=8, pack=4) is not table_of({"a": a[::-1]}, chunk=8, pack=4)


def test_meta_tensors_get_a_table_of_the_same_size() -> None:
    a = randoms((10_000, 77))
    real = table_of({"a": a}, chunk=8, pack=4)
    meta = table_of({"a": [x.to("meta") for x in a]}, chunk=8, pack=4)
    assert meta.values.is_meta
    assert (meta.values.shape, meta.n_chunks) == (real.values.shape, real.n_chunks)


def test_a_ledger_does_not_see_tables() -> None:
    """Whether there is one already depends on what ran before."""
    tensors = [torch.empty(12_345, device="meta")]
    with metered_by(ledger := Ledger()):
        ledger.start_step()
        table_of({"a": tensors}, chunk=32, pack=4)
    assert ledger.report().peak_bytes == 0


@pytest.mark.parametrize("sizes", [(10_000, 77, 0), (8,), (0,)])
def test_sizes_are_those_of_the_estimator(sizes: tuple[int, ...]) -> None:
    a, b = randoms(sizes), randoms(sizes, torch.bfloat16)
    table = table_of({"a": a, "b": b}, {"side": [torch.zeros(1) for _ in a]}, chunk=8, pack=4)
    assert table.n_chunks == n_chunks(sizes, 8)
    assert table.values.numel() * 8 == table_bytes(sizes, 3, 8)


@pytest.mark.parametrize(
    ("b", "sides", "message"),
    [
        ([torch.ones(4)], {}, "number of b is 1; allowed: 2, as many as a"),
        ([torch.ones(4), torch.ones(4)], {}, r"size of b\[1\] is 4; allowed: 5, as a\[1\]"),
        ([torch.ones(4), torch.ones(5).double()], {}, "dtypes of b is .*one dtype"),
        ([torch.ones(4), torch.ones(10)[::2]], {}, "strides of b is .*contiguous"),
        ([torch.ones(4), torch.ones(5)], {"c": [torch.ones(1)]}, "number of c is 1"),
        ([torch.ones(4), torch.ones(5).to("meta")], {}, "devices of the tensors"),
    ],
)
def test_lists_that_do_not_match(b: list[torch.Tensor], sides: dict[str, list[torch.Tensor]], message: str) -> None:
    a = [torch.ones(4), torch.ones(5)]
    with pytest.raises(InputError, match=message):
        table_of({"a": a, "b": b}, sides, chunk=8, pack=4)
