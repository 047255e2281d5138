"""Optimizer steps over many tensors in one pass: gradients are unscaled and clipped, fp32 parameters and states updated in place,
the model's 16-bit parameters written, nothing read back by the host.

Rules: ``rules.py`` (LAMB needs two passes: ``lamb.py``). Adam's moments are fp32 or 8-bit (``blockwise8.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from estimator.errors import invalid
from estimator.ops.kernels.chip import Tile
from estimator.ops.kernels.optimizer import PACK, RULES, UNROLL, chunk_elements, n_lists
from runtime.kernels import loader
from runtime.kernels.blockwise8 import Blockwise8, check8, decode, device_maps, encode
from runtime.kernels.loader import Argument, Kernel, chip, kernel, launch, type_name
from runtime.kernels.rules import Adam, Control, Rule
from runtime.kernels.tables import Lists, check_lists, table_of

State = Tensor | Blockwise8

_THREADS8, _BLOCKS8 = 128, 5
"""Of the 8-bit kernel: at most 102 registers for a thread, which it fills without spilling."""


def optimizer_step(
    rule: Rule, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[State]], control: Control,
    copies: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """One step of Adam, SGD, Lion or Adagrad on every tensor, in place.

    ``params[i]`` fp32; ``grads[i]`` bf16, fp16 or fp32, not changed; ``states[s][i]`` fp32, or for Adam ``Blockwise8`` (all
    of them): Adam's first and second moment, one state for the others, all zero before the first step; ``copies[i]``: where the
    new parameters are written, rounded once. All contiguous, of ``params[i]``'s size; one dtype to a list. Raises
    ``InputError`` for lists that do not match.
    """
    if not params:
        return
    lists, sides = _checked_lists(rule, params, grads, states, copies)
    if not loader.uses_kernel(rule.kernel, params[0]):
        check_lists(lists, sides)
        return _step_in_torch(rule, params, grads, states, control, copies)
    _step(rule, lists, sides, control, copies)


def optimizer_step_reference(
    rule: Rule, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[State]], control: Control,
    copies: Sequence[Tensor] | None = None,
) -> None:  # fmt: skip
    """``optimizer_step`` in plain torch."""
    if params:
        check_lists(*_checked_lists(rule, params, grads, states, copies))
        _step_in_torch(rule, params, grads, states, control, copies)


def check_dtypes(name: str, tensors: Iterable[Tensor], allowed: tuple[torch.dtype, ...]) -> None:
    """Raises ``InputError`` unless the tensors' dtype is one of ``allowed``."""
    for tensor in tensors:
        if tensor.dtype not in allowed:
            raise invalid(f"dtype of {name}", tensor.dtype, ", ".join(map(str, allowed)))


WIDE = (torch.float32, torch.float64)
"""Dtypes of parameters and states; fp64 only for references."""
ANY = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _checked_lists(
    rule: Rule, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[State]],
    copies: Sequence[Tensor] | None,
) -> tuple[Lists, Lists]:  # fmt: skip
    """The lists in the kernel's order, and those of the magnitudes of 8-bit states."""
    if rule.kernel == "lamb":
        raise invalid("rule", "lamb", "adam, sgd, lion or adagrad; lamb_step takes LAMB")
    if len(states) != rule.n_states:
        raise invalid(f"number of states of {rule.kernel}", len(states), str(rule.n_states))
    lists: dict[str, Sequence[Tensor]] = {"parameters": params, "gradients": grads}
    sides: dict[str, Sequence[Tensor]] = {}
    kinds = {isinstance(state, Blockwise8) for group in states for state in group}
    if kinds == {True, False} or (True in kinds and not isinstance(rule, Adam)):
        raise invalid(f"states of {rule.kernel}", "Blockwise8", "fp32 tensors, or for Adam Blockwise8 throughout")
    for s, group in enumerate(states):
        tensors, magnitudes = [], []
        for state in group:
            if isinstance(state, Blockwise8):
                check8(state, f"states[{s}]")
                tensors.append(state.codes)
                magnitudes.append(state.absmax)
            else:
                tensors.append(state)
        lists[f"states[{s}]"] = tensors
        if True in kinds:
            sides[f"magnitudes of states[{s}]"] = magnitudes
        else:
            check_dtypes(f"states[{s}]", tensors, WIDE)
    if copies is not None:
        lists["copies"] = copies
        check_dtypes("copies", copies, ANY)
    check_dtypes("parameters", params, WIDE)
    check_dtypes("gradients", grads, ANY)
    return lists, sides


@torch.no_grad()
def _step_in_torch(
    rule: Rule, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Sequence[State]], control: Control,
    copies: Sequence[Tensor] | None,
) -> None:  # fmt: skip
    for i, param in enumerate(params):
        own = [group[i] for group in states]
        wide = [decode(s, signed=k == 0) if isinstance(s, Blockwise8) else s for k, s in enumerate(own)]
        new, new_states = rule.stepped(param, factored(grads[i], control, param), wide, control)
        write_unless_skipped(param, new, control)
        for k, (state, value) in enumerate(zip(own, new_states, strict=True)):
            if isinstance(state, Blockwise8):
                coded = encode(value, signed=k == 0)
                write_unless_skipped(state.codes, coded.codes, control)
                write_unless_skipped(state.absmax, coded.absmax, control)
            else:
                write_unless_skipped(state, value, control)
        if copies is not None:
            write_unless_skipped(copies[i], new.to(copies[i].dtype), control)


def factored(grad: Tensor, control: Control, like: Tensor) -> Tensor:
    """``grad`` times the factor, in ``like``'s dtype."""
    wide = grad.to(like.dtype)
    return wide if control.factor is None else wide * control.factor.to(like.dtype)


def write_unless_skipped(target: Tensor, value: Tensor, control: Control) -> None:
    target.copy_(value if control.skip is None else torch.where(control.skip != 0, target, value))


# ---- launchers --------------------------------------------------------------------------------------------------------


def step_arguments(rule: Rule, control: Control) -> tuple[Argument, ...]:
    """``STEP_PARAMETERS`` of ``optimizer.cuh``."""
    lr_at, lr = (control.lr, 0.0) if isinstance(control.lr, Tensor) else (None, float(control.lr))
    return control.skip, control.factor, lr_at, control.step, lr, *rule.coefficients().arguments()


def check_fp32(params: Sequence[Tensor], states: Iterable[Sequence[Tensor]]) -> None:
    """Raises ``InputError`` unless the kernels can take these parameters and states."""
    check_dtypes("parameters on a GPU", params[:1], (torch.float32,))
    for group in states:
        check_dtypes("states on a GPU", group[:1], (torch.float32, torch.uint8))


@functools.cache
def _kernel(rule: str, eight_bit: bool, grad: torch.dtype, copy: torch.dtype | None, tile: Tile) -> Kernel:
    common: dict[str, str | int] = {
        "RULE": rule.upper(), "GRAD_TYPE": type_name(grad), "COPY": int(copy is not None),
        "COPY_TYPE": "f32" if copy is None else type_name(copy), "PACK": PACK, "THREADS": _threads(eight_bit, tile),
        "CHUNK": chunk_elements(tile),
        "LISTS": n_lists(rule, copies=copy is not None, eight_bit=eight_bit),
    }  # fmt: skip
    if eight_bit:
        return kernel("optimizer8", "optimizer8_step", BLOCKS=_BLOCKS8, **common)
    return kernel("optimizer", "optimizer_step", STATES=RULES[rule].n_states, UNROLL=UNROLL, **common)


def _threads(eight_bit: bool, tile: Tile) -> int:
    return _THREADS8 if eight_bit else tile.threads


def _launch(rule: Rule, lists: Lists, sides: Lists, control: Control, copies: Sequence[Tensor] | None) -> None:
    params = lists["parameters"]
    check_fp32(params, [tensors for name, tensors in lists.items() if name.startswith("states")])
    device = params[0].device
    tile = chip(device).tile
    table = table_of(lists, sides, chunk=chunk_elements(tile), pack=PACK, from_start=bool(sides))
    grad, copy = lists["gradients"][0].dtype, None if copies is None else copies[0].dtype
    compiled = _kernel(rule.name, bool(sides), grad, copy, tile)
    maps = (device_maps(device),) if sides else ()
    launch(
        compiled, table.n_chunks, _threads(bool(sides), tile), table.values, table.n_chunks, *maps,
        *step_arguments(rule, control),
    )  # fmt: skip


_step = loader.outside_compile(_launch)
