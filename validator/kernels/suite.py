"""Suites of kernels: ``validator.suites`` with ``measure = "kernels"``.

Keys of a matrix are ``gpu`` (``"here"`` or ``"cpu"``), ``kernel`` (names, or ``"all"``), ``backward``, ``both`` (forward and
backward together), ``dtype``, ``mib`` (about how much one call moves) and ``implementation``; a list is an axis.

Implementations of the same kernel, direction, dtype and size stand one after the other, ours first: what is compared was
measured within seconds. Ours beside its rivals comes before ours beside plain torch alone, and that before the rest; among
equals the most informative comes first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from estimator.errors import InputError, require_choice, unknown_choice
from estimator.job.fields import shown, text
from estimator.units import MIB
from validator.kernels.case import KernelCase
from validator.kernels.implementation import IMPLEMENTATIONS
from validator.kernels.table import NAMES, kernel
from validator.suites import LeftOut, combinations_of, most_informative_first

KEYS = ("gpu", "kernel", "backward", "both", "dtype", "mib", "implementation")
OWN_KEYS = ("about", "measure", "matrix")
_DEFAULTS = {"backward": False, "both": False, "implementation": "torch"}


@dataclass(frozen=True, kw_only=True)
class KernelPlan:
    """What a campaign of kernels is to measure, most informative first."""

    suite: str
    about: str = ""
    cases: tuple[KernelCase, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def needs_gpu(self) -> bool:
        return any(case.device == "cuda" for case in self.cases)


def expand_kernels(name: str, data: dict[str, Any]) -> KernelPlan:
    """The cases of a suite's ``data``, and the combinations that are none. Raises ``InputError`` for unknown names.

    Whether there is a GPU is not asked here.
    """
    where = f"suite {name!r}"
    axes = [data, *(data["matrix"] if isinstance(data.get("matrix"), list) else ())]
    for axis in axes:  # "all" stands for every name
        if isinstance(axis, dict) and axis.get("kernel") == "all":
            axis["kernel"] = list(NAMES)
    settings: list[dict[str, Any]] = []
    cases: list[KernelCase] = []
    left_out: list[LeftOut] = []
    seen: set[str] = set()
    for combination in combinations_of(where, data, KEYS, OWN_KEYS):
        combination = {**_DEFAULTS, **combination}
        _check(where, combination)
        try:
            case = _case(combination)
            reason = "it is listed twice" if case.key in seen else None
        except InputError as error:
            reason = str(error)
        if reason:
            left_out.append(LeftOut(settings=combination, reason=_in_general(combination, reason)))
            continue
        seen.add(case.key)
        settings.append(combination)
        cases.append(case)
    return KernelPlan(
        suite=name,
        about=text(f"{where}: about", data.get("about", "")),
        cases=tuple(cases[i] for i in _side_by_side(settings)),
        left_out=tuple(left_out),
    )


def _side_by_side(settings: Sequence[dict[str, Any]]) -> Iterator[int]:
    """Indices of ``settings``: see above."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, setting in enumerate(settings):
        groups.setdefault(tuple(setting[key] for key in KEYS if key != "implementation"), []).append(i)
    rank = {name: place for place, name in enumerate(IMPLEMENTATIONS)}
    tiers: list[list[list[int]]] = [[], [], []]
    for members in groups.values():
        members.sort(key=lambda i: rank[settings[i]["implementation"]])
        present = {settings[i]["implementation"] for i in members}
        tiers[2 if "cuda" not in present else 1 if present <= {"cuda", "torch"} else 0].append(members)
    for tier in tiers:
        common = [{k: v for k, v in settings[members[0]].items() if k != "implementation"} for members in tier]
        for place in most_informative_first(common):
            yield from tier[place]


def _check(where: str, combination: dict[str, Any]) -> None:
    """Misspelled values are the writer's mistake; combinations that do not exist are only left out."""
    for key in ("gpu", "kernel", "dtype", "mib"):
        if key not in combination:
            raise InputError(f"{where}: {key} is not given; a suite of kernels needs it")
    require_choice(f"{where}: gpu", combination["gpu"], ("here", "cpu"))
    if combination["kernel"] not in NAMES:
        raise unknown_choice(f"{where}: kernel", combination["kernel"], ("all", *NAMES))
    require_choice(f"{where}: dtype", combination["dtype"], ("bf16", "fp16", "fp32"))
    require_choice(f"{where}: implementation", combination["implementation"], IMPLEMENTATIONS)
    mib = combination["mib"]
    if isinstance(mib, bool) or not isinstance(mib, int | float) or not 0 < mib <= 1 << 20:
        raise InputError(f"{where}: mib is {shown(mib)}; allowed: a number > 0, at most {1 << 20}")
    for key in ("backward", "both"):
        if type(combination[key]) is not bool:
            raise InputError(f"{where}: {key} is {shown(combination[key])}; allowed: true, false")


def _case(combination: dict[str, Any]) -> KernelCase:
    entry = kernel(combination["kernel"], combination["backward"], combination["both"])
    if combination["dtype"] not in entry.dtypes:
        raise InputError(f"the kernel does not take dtype {combination['dtype']!r}")
    return KernelCase(
        kernel=entry.name, backward=entry.backward, both=entry.both, dtype=combination["dtype"],
        n_bytes=max(1, round(combination["mib"] * MIB)), implementation=combination["implementation"],
        device="cpu" if combination["gpu"] == "cpu" else "cuda",
    )  # fmt: skip


def _in_general(combination: dict[str, Any], reason: str) -> str:
    """``reason`` without the kernel's name, so that equal reasons can be counted."""
    name = repr(combination["kernel"])
    return reason.replace(f"kernel {name}", "the kernel").replace(name, "it")
