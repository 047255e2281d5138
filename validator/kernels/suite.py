"""Suites of kernels: ``validator.suites`` with ``measure = "kernels"``.

Keys of a matrix are ``gpu`` (``"here"`` or ``"cpu"``), ``kernel`` (names, or ``"all"``), ``backward``, ``dtype``, ``mib``
(about how much one call moves) and ``implementation``; a list is an axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from estimator.errors import InputError, require_choice, unknown_choice
from estimator.job.fields import shown, text
from estimator.units import MIB
from validator.kernels.case import KernelCase
from validator.kernels.table import NAMES, kernel
from validator.suites import LeftOut, combinations_of, most_informative_first

KEYS = ("gpu", "kernel", "backward", "dtype", "mib", "implementation")
OWN_KEYS = ("about", "measure", "matrix")
_DEFAULTS = {"backward": False, "implementation": "torch"}


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
        cases=tuple(cases[i] for i in most_informative_first(settings)),
        left_out=tuple(left_out),
    )


def _check(where: str, combination: dict[str, Any]) -> None:
    """Misspelled values are the writer's mistake; combinations that do not exist are only left out."""
    for key in ("gpu", "kernel", "dtype", "mib"):
        if key not in combination:
            raise InputError(f"{where}: {key} is not given; a suite of kernels needs it")
    require_choice(f"{where}: gpu", combination["gpu"], ("here", "cpu"))
    if combination["kernel"] not in NAMES:
        raise unknown_choice(f"{where}: kernel", combination["kernel"], ("all", *NAMES))
    require_choice(f"{where}: dtype", combination["dtype"], ("bf16", "fp16", "fp32"))
    require_choice(f"{where}: implementation", combination["implementation"], ("cuda", "torch"))
    mib, backward = combination["mib"], combination["backward"]
    if isinstance(mib, bool) or not isinstance(mib, int | float) or not 0 < mib <= 1 << 20:
        raise InputError(f"{where}: mib is {shown(mib)}; allowed: a number > 0, at most {1 << 20}")
    if type(backward) is not bool:
        raise InputError(f"{where}: backward is {shown(backward)}; allowed: true, false")


def _case(combination: dict[str, Any]) -> KernelCase:
    if combination["dtype"] not in kernel(combination["kernel"], combination["backward"]).dtypes:
        raise InputError(f"the kernel does not take dtype {combination['dtype']!r}")
    return KernelCase(
        kernel=combination["kernel"], backward=combination["backward"], dtype=combination["dtype"],
        n_bytes=max(1, round(combination["mib"] * MIB)), implementation=combination["implementation"],
        device="cpu" if combination["gpu"] == "cpu" else "cuda",
    )  # fmt: skip


def _in_general(combination: dict[str, Any], reason: str) -> str:
    """``reason`` without the kernel's name, so that equal reasons can be counted."""
    name = repr(combination["kernel"])
    return reason.replace(f"kernel {name}", "the kernel").replace(name, "it")
