"""Finding a module's units: what is fetched, computed, reduced and stepped together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from estimator.errors import InputError
from estimator.sharding.units import Param, Unit


class LiveUnit(NamedTuple):
    """A unit of a live module: its submodule, its description, and the parameters it owns, in that order."""

    module: nn.Module
    unit: Unit
    params: list[nn.Parameter]

    def param(self, described: Param) -> nn.Parameter:
        """The parameter that ``described`` (one of ``unit.params``) describes."""
        return self.params[self.unit.params.index(described)]


def find_units(model: nn.Module) -> list[LiveUnit]:
    """The children of ``model`` in order, lists of modules taken apart (``embed``, ``blocks.0``, ..., ``head``), and so are children
    that have such a list of blocks (a Hugging Face model's ``model.layers``).

    They must run once each per forward pass, in this order, and hold all parameters; a parameter that several share
    belongs to the first, the others borrow it. A module that is listed more than once is as many units, which share all
    parameters. Raises ``InputError`` otherwise.
    """
    modules = list(_parts(model))
    own = [name for name, _ in model.named_parameters(recurse=False)]
    if own:
        raise InputError(
            f"model has parameters outside its child modules: {', '.join(own)}; put them into a child module"
        )
    owner: dict[nn.Parameter, int] = {}
    units: list[LiveUnit] = []
    for name, module in modules:
        mine, params, borrows = [], [], []
        for param_name, param in module.named_parameters():
            if param in owner:
                borrows.append(owner[param])
                continue
            owner[param] = len(units)
            split = getattr(param, "part", None)
            is_shared = f"{name}.{param_name}" in getattr(model, "shared_params", ())
            mine.append(
                Param(
                    param_name,
                    tuple(param.shape),
                    param.requires_grad,
                    split,
                    is_shared,
                    getattr(param, "sparse_rows", 0),
                )
            )
            params.append(param)
        if not mine and not borrows:
            continue
        kind = name.split(".")[0] if "." not in name else "block"
        reads = not all(
            isinstance(m, nn.Embedding) for m in module.modules() if next(m.parameters(recurse=False), None) is not None
        )
        unit = Unit(name, kind, tuple(mine), tuple(dict.fromkeys(borrows)), backward_reads=reads)
        units.append(LiveUnit(module, unit, params))
    if not units:
        raise InputError("model has no parameters; there is nothing to train")
    if not any(unit.unit.is_trained for unit in units):
        raise InputError("no parameter of the model requires a gradient; there is nothing to train")
    return units


def _parts(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from ((f"{prefix}{name}.{i}", part) for i, part in enumerate(child))
        elif isinstance(child, nn.ModuleDict):
            yield from ((f"{prefix}{name}.{key}", part) for key, part in child.items())
        elif _has_blocks(child):
            yield from _parts(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _has_blocks(module: nn.Module) -> bool:
    """Whether its parameters are those of modules among which there is a list of blocks: of several modules of one class, which
    have modules in turn."""
    if next(module.parameters(recurse=False), None) is not None:
        return False
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            if (
                len(child) > 1
                and len({type(part) for part in child}) == 1
                and all(any(part.children()) for part in child)
            ):
                return True
        elif _has_blocks(child):
            return True
    return False
