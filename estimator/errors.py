"""The one error that users see: a field, its value, what is allowed, the nearest valid spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A user's mistake, told in one sentence; the command line turns it into exit code 2.

    Everything below the face raises this (and only this) for bad input. Broken invariants of the
    program itself are ``assert`` failures, never an ``InputError``.
    """


def invalid(field: str, value: object, allowed: str) -> InputError:
    """``field``'s ``value`` is not one of ``allowed`` (a phrase, e.g. "a whole number >= 1")."""
    return InputError(f"{field} is {value!r}; allowed: {allowed}")


def unknown_choice(field: str, value: object, choices: Iterable[str]) -> InputError:
    """``value`` is not one of the named ``choices``; the nearest one is suggested."""
    names = sorted(choices)
    close = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return InputError(f"{field} is {value!r}; allowed: {', '.join(names)}{hint}")


def require_int(field: str, value: object, minimum: int = 1) -> int:
    """``value`` as a whole number >= ``minimum`` (``bool`` and floats are refused)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise invalid(field, value, f"a whole number >= {minimum}")
    return value


def require_choice(field: str, value: object, choices: Iterable[str]) -> str:
    """``value`` as one of ``choices``."""
    names = tuple(choices)
    if not isinstance(value, str) or value not in names:
        raise unknown_choice(field, value, names)
    return value
