"""Gradients of a table of which few rows are used: only these are exchanged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from estimator.errors import InputError, require_int
from estimator.schedule.events import AddRows, PickRows
from runtime.context import has_data
from runtime.storage import GroupStorage


def mark_tables(model: nn.Module, rows: Mapping[str, int], *, wanted: bool) -> None:
    """Say of parameters how many rows a micro-batch looks up at most; ``wanted``: the strategy exchanges rows.

    Raises ``InputError`` for names that are no tables of ``model``'s own, or where rows are given that nobody wants, or not.
    """
    if wanted != bool(rows):
        raise InputError(
            f"sparse_embeddings is {wanted} with sparse_rows {dict(rows)}; allowed: on with the rows that a micro-batch looks up at most, "
            "by name of the embedding's parameter, or off without"
        )
    every = list(model.named_parameters(remove_duplicate=False))
    for name, count in rows.items():
        require_int(f"sparse_rows[{name!r}]", count)
        param = next((p for own, p in every if own == name), None)
        if param is None or param.ndim != 2 or sum(p is param for _, p in every) > 1:
            raise InputError(
                f"sparse_rows names {name!r}; allowed: matrices of the model that nothing but one look-up reads"
            )
        param.sparse_rows = count  # type: ignore[attr-defined]


def pick(event: PickRows, storage: GroupStorage) -> None:
    """Fill ``ids`` and ``rows`` from the table of gradients. Where fewer rows are not zero, some that are zero come along.

    Raises ``InputError`` on a CPU when more are; elsewhere, where the host does not know, what is sent is then NaN.
    """
    table = _table(event.table, storage)
    sizes = torch.linalg.vector_norm(table, float("inf"), dim=1)
    ids, rows = storage.tensors["ids"].view(torch.int64), _matrix(storage, "rows", event.table[1])
    torch.topk(sizes, event.n_rows, sorted=False, out=(torch.empty_like(sizes[: event.n_rows]), ids))
    torch.index_select(table, 0, ids, out=rows)
    if event.n_rows < event.table[0]:
        _check(sizes, rows, event.n_rows)


def _check(sizes: Tensor, rows: Tensor, n_rows: int) -> None:
    used = sizes.count_nonzero()
    if not has_data(used):
        return
    if rows.device.type == "cpu":
        if int(used) > n_rows:
            raise InputError(
                f"sparse_rows allows {n_rows} rows of an embedding in a step, whose gradients have {int(used)}"
            )
        return
    rows.add_(torch.where(used > n_rows, torch.nan, 0.0))


def add(event: AddRows, storage: GroupStorage) -> None:
    """The table of gradients becomes the sum of what was received, added in the order of ranks in its own dtype."""
    table = _table(event.table, storage)
    storage.tensors["full_grads"].zero_()
    ids = storage.tensors["received_ids"].view(torch.int64).view(event.pieces, -1)
    rows = _matrix(storage, "received_rows", event.table[1]).view(event.pieces, event.n_rows, -1)
    for own_ids, own_rows in zip(ids, rows, strict=True):
        table.index_add_(0, own_ids, own_rows)


def _table(shape: tuple[int, int], storage: GroupStorage) -> Tensor:
    return storage.tensors["full_grads"][: shape[0] * shape[1]].view(shape)


def _matrix(storage: GroupStorage, role: str, columns: int) -> Tensor:
    return storage.tensors[role].view(storage.grad_dtype).view(-1, columns)
