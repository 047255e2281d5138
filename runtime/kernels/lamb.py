"""LAMB (You et al. 2020, algorithm 2) over many tensors in two passes: moments and norms, then the step at each tensor's own rate.

Between the two lies a sum for each tensor, in fp64 and in a fixed order. Where a tensor is sharded, sum ``lamb_moments``'s result over the ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from estimator.errors import invalid
from estimator.ops.kernels.chip import Tile
from estimator.ops.kernels.optimizer import PACK, RULES, UNROLL, chunk_elements
from runtime.kernels import loader
from runtime.kernels.loader import Kernel, chip, kernel, launch, type_name
from runtime.kernels.optimizer import (
    ANY,
    WIDE,
    check_dtypes,
    check_fp32,
    factored,
    step_arguments,
    write_unless_skipped,
)
from runtime.kernels.rules import Control, Lamb, trust_ratio
from runtime.kernels.tables import Lists, check_lists, table_of


def lamb_step(
    rule: Lamb, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[Tensor]], control: Control,
    copies: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """One step in place; tensors as for ``optimizer_step``, ``states``: first and second moments, fp32."""
    norms = lamb_moments(rule, params, grads, states, control)
    lamb_apply(rule, params, norms, states, control, copies)


def lamb_moments(
    rule: Lamb, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[Tensor]], control: Control
) -> Tensor:
    """First pass: the moments, in place. Returns fp32 ``[tensors, 2]``: sums of squares of the parameters and of their updates
    (zeros where the step is skipped)."""
    lists = _lists(params, states, grads, None)
    if not params:
        return torch.zeros(0, 2)
    if not loader.uses_kernel("lamb", params[0]):
        check_lists(lists)
        return _moments_in_torch(rule, params, grads, states, control)
    check_fp32(params, states)
    return _moments(rule, lists, control)


def lamb_moments_reference(
    rule: Lamb, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[Tensor]], control: Control
) -> Tensor:
    """``lamb_moments`` in plain torch."""
    check_lists(_lists(params, states, grads, None))
    return _moments_in_torch(rule, params, grads, states, control) if params else torch.zeros(0, 2)


def lamb_apply(
    rule: Lamb, params: Sequence[Tensor], norms: Tensor, states: Sequence[Sequence[Tensor]], control: Control,
    copies: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """Second pass: parameters and copies, at the rates that ``norms`` (of the first pass, whole tensors) give."""
    if norms.shape != (len(params), 2):
        raise invalid("shape of norms", tuple(norms.shape), f"[{len(params)}, 2]")
    if not params:
        return
    lists = _lists(params, states, None, copies)
    if not loader.uses_kernel("lamb", params[0]):
        check_lists(lists)
        return _apply_in_torch(rule, params, norms, states, control, copies)
    check_fp32(params, states)
    check_dtypes("norms", [norms], (torch.float32,))
    _apply(rule, lists, norms.contiguous(), control)


def lamb_apply_reference(
    rule: Lamb, params: Sequence[Tensor], norms: Tensor, states: Sequence[Sequence[Tensor]], control: Control,
    copies: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """``lamb_apply`` in plain torch."""
    check_lists(_lists(params, states, None, copies))
    _apply_in_torch(rule, params, norms, states, control, copies)


def _lists(
    params: Sequence[Tensor], states: Sequence[Sequence[Tensor]], grads: Sequence[Tensor] | None,
    copies: Sequence[Tensor] | None,
) -> Lists:  # fmt: skip
    if len(states) != RULES["lamb"].n_states:
        raise invalid("number of states of lamb", len(states), str(RULES["lamb"].n_states))
    lists = {"parameters": params, "first moments": states[0], "second moments": states[1]}
    for name, tensors in (("gradients", grads), ("copies", copies)):
        if tensors is not None:
            lists[name] = tensors
    for name, tensors in lists.items():
        check_dtypes(name, tensors, ANY if name in ("gradients", "copies") else WIDE)
    return lists


@torch.no_grad()
def _moments_in_torch(
    rule: Lamb, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[Tensor]], control: Control
) -> Tensor:
    norms = params[0].new_zeros(len(params), 2)
    for i, param in enumerate(params):
        moments = rule.moments(factored(grads[i], control, param), [states[0][i], states[1][i]])
        update = rule.update(param, moments, control.step)
        write_unless_skipped(norms[i], torch.stack((param.square().sum(), update.square().sum())), control)
        for group, moment in zip(states, moments, strict=True):
            write_unless_skipped(group[i], moment, control)
    return norms


@torch.no_grad()
def _apply_in_torch(
    rule: Lamb, params: Sequence[Tensor], norms: Tensor, states: Sequence[Sequence[Tensor]], control: Control,
    copies: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    for i, param in enumerate(params):
        update = rule.update(param, [states[0][i], states[1][i]], control.step)
        new = param - control.lr * trust_ratio(norms[i, 0], norms[i, 1]) * update
        write_unless_skipped(param, new, control)
        if copies is not None:
            write_unless_skipped(copies[i], new.to(copies[i].dtype), control)


# ---- launchers --------------------------------------------------------------------------------------------------------


@functools.cache
def _kernel(function: str, *, grad: torch.dtype, copy: torch.dtype | None, n_lists: int, tile: Tile) -> Kernel:
    return kernel(
        "lamb", function, RULE="LAMB", GRAD_TYPE=type_name(grad), COPY=int(copy is not None),
        COPY_TYPE="f32" if copy is None else type_name(copy), LISTS=n_lists, PACK=PACK, UNROLL=UNROLL,
        THREADS=tile.threads, CHUNK=chunk_elements(tile),
    )  # fmt: skip


def _launch_moments(rule: Lamb, lists: Lists, control: Control) -> Tensor:
    device = lists["parameters"][0].device
    tile = chip(device).tile
    table = table_of(lists, chunk=chunk_elements(tile), pack=PACK)
    partial = torch.empty(table.n_chunks, 2, dtype=torch.float32, device=device)
    norms = torch.empty(table.n_tensors, 2, dtype=torch.float32, device=device)
    grad = lists["gradients"][0].dtype
    first, second = (
        _kernel(function, grad=grad, copy=None, n_lists=len(lists), tile=tile)
        for function in ("lamb_moments", "lamb_norms")
    )
    arguments = step_arguments(rule, control)
    launch(first, table.n_chunks, tile.threads, table.values, table.n_chunks, partial, *arguments)
    launch(second, table.n_tensors, tile.threads, table.values, table.n_chunks, partial, norms, table.n_tensors)
    return norms


def _launch_apply(rule: Lamb, lists: Lists, norms: Tensor, control: Control) -> None:
    tile = chip(lists["parameters"][0].device).tile
    table = table_of(lists, chunk=chunk_elements(tile), pack=PACK)
    copy = lists["copies"][0].dtype if "copies" in lists else None
    compiled = _kernel("lamb_apply", grad=torch.float32, copy=copy, n_lists=len(lists), tile=tile)
    arguments = step_arguments(rule, control)
    launch(compiled, table.n_chunks, tile.threads, table.values, table.n_chunks, norms, *arguments)


_moments = loader.outside_compile(_launch_moments)
_apply = loader.outside_compile(_launch_apply)
