"""The kernels by name, and which of them are switched on.

``ZEROCAST_KERNELS_OFF=rms_norm,rotary`` (or ``all``) switches kernels off for a process, ``switched_off("rms_norm")``
for a ``with`` block; the plain-torch reference then runs in their place.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from estimator.errors import unknown_choice
from estimator.job.kernels import KERNELS

ENVIRONMENT = "ZEROCAST_KERNELS_OFF"
_off: list[frozenset[str]] = []
_known: dict[str, frozenset[str]] = {}


def enabled(name: str) -> bool:
    """Whether kernel ``name`` is switched on in this process."""
    assert name in KERNELS, name
    return name not in _parsed(os.environ.get(ENVIRONMENT, "")) and not any(name in names for names in _off)


@contextmanager
def switched_off(*names: str) -> Iterator[None]:
    """Switches the named kernels (``"all"``: every kernel) off, in all threads of the process, until the block ends."""
    off = _checked(names, "kernel")
    _off.append(off)
    try:
        yield
    finally:
        _off.remove(off)


def _parsed(text: str) -> frozenset[str]:
    if text not in _known:
        _known[text] = _checked(tuple(name.strip() for name in text.split(",") if name.strip()), ENVIRONMENT)
    return _known[text]


def _checked(names: tuple[str, ...], field: str) -> frozenset[str]:
    for name in names:
        if name != "all" and name not in KERNELS:
            raise unknown_choice(field, name, ("all", *KERNELS))
    return frozenset(KERNELS if "all" in names else names)
