"""Typed reading of plain data (parsed JSON or TOML) at the door: every mistake becomes one ``InputError``."""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from estimator.errors import InputError

T = TypeVar("T")

MAX_INT = 2**63 - 1
"""Largest whole number taken from a user: beyond it nothing is a size any more."""
MAX_LAYERS = 10_000
"""Largest number of blocks: every one is listed as a unit, so that an absurd number would fill memory."""


def shown(value: object) -> str:
    """``value`` as it may stand in a sentence: its ``repr`` on one line, cut to 80 characters."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 77 digits"
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def refuse(field: str, value: object, allowed: str) -> InputError:
    """``field``'s ``value`` is not what is ``allowed``."""
    return InputError(f"{field} is {shown(value)}; allowed: {allowed}")


def nearest(value: object, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the choice that is nearest to ``value``, or nothing."""
    if not isinstance(value, str):
        return ""
    close = difflib.get_close_matches(value[:80].lower(), list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def whole(field: str, value: object, minimum: int = 1, maximum: int = MAX_INT) -> int:
    """``value`` as a whole number in [``minimum``, ``maximum``]; booleans, floats and strings are refused."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise refuse(field, value, f"a whole number >= {minimum}")
    if value > maximum:
        raise refuse(field, value, f"a whole number <= {maximum}")
    return value


def _integer(field: str, value: object) -> int:
    """``value`` as a whole number of any sign; its range is checked where the number is used."""
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_INT:
        raise refuse(field, value, "a whole number")
    return value


def number(field: str, value: object, minimum: float = 0.0) -> float:
    """``value`` as a finite number >= ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(field, value, "a number")
    if isinstance(value, int):
        _integer(field, value)
    if not math.isfinite(value) or value < minimum:
        raise refuse(field, value, "a finite number" + (f" >= {minimum:g}" if math.isfinite(minimum) else ""))
    return float(value)


def flag(field: str, value: object) -> bool:
    """``value`` as true or false."""
    if not isinstance(value, bool):
        raise refuse(field, value, "true or false")
    return value


def text(field: str, value: object) -> str:
    """``value`` as a string of at most 4,096 printable characters (names end up in one-line messages)."""
    if not isinstance(value, str) or len(value) > 4096 or not value.isprintable():
        raise refuse(field, value, "a text of at most 4096 printable characters")
    return value


def table(field: str, value: object) -> dict[str, Any]:
    """``value`` as a table (JSON object) whose keys are printable texts (they end up in one-line messages)."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key.isprintable() for key in value):
        raise refuse(field, value, "a table of named values")
    return dict(value)


def known_keys(section: str, data: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Raises ``InputError`` for a key of ``data`` that is not ``allowed``, with the nearest one that is."""
    names = sorted(allowed)
    for key in data:
        if key not in names:
            raise InputError(
                f"{section} has the unknown key {shown(key)}; allowed: {', '.join(names)}{nearest(key, names)}"
            )


def typed(field: str, value: Any, hint: Any) -> Any:
    """``value`` as the type ``hint`` of a dataclass field; whole numbers become floats where floats are wanted."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        (inner,) = (arg for arg in get_args(hint) if arg is not type(None))
        return None if value is None else typed(field, value, inner)
    if hint is bool:
        return flag(field, value)
    if hint is int:
        return _integer(field, value)
    if hint is float:
        return number(field, value, minimum=-math.inf)
    if hint is str:
        return text(field, value)
    if origin is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            raise refuse(field, value, ", ".join(map(repr, get_args(hint))) + nearest(value, get_args(hint)))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise refuse(field, value, _LISTS.get(get_args(hint)[0], "a list"))
        return tuple(typed(field, item, get_args(hint)[0]) for item in value)
    if isinstance(hint, type) and issubclass(hint, tuple):
        return _record(field, value, hint)
    if is_dataclass(hint):
        return build(hint, field, value)  # type: ignore[arg-type]  # an instance is none of the hints
    assert origin is not None and issubclass(origin, Mapping), f"no reader for {hint}"
    return {key: number(f"{field}.{key}", item) for key, item in table(field, value).items()}


_LISTS = {int: "a list of whole numbers", str: "a list of texts"}


def _record(field: str, value: Any, cls: Any) -> Any:
    """``value``, a list, as the ``NamedTuple`` ``cls``; what is missing at its end has defaults."""
    hints = hints_of(cls)
    needed = len(hints) - len(cls._field_defaults)
    if not isinstance(value, list | tuple) or not needed <= len(value) <= len(hints):
        raise refuse(field, value, f"a list of {', '.join(hints)}")
    return cls(*(typed(f"{field}.{name}", item, hints[name]) for name, item in zip(hints, value, strict=False)))


@lru_cache(maxsize=32)
def hints_of(cls: type) -> dict[str, Any]:
    """Resolved type of every field of the dataclass ``cls``."""
    return get_type_hints(cls)


def build(cls: type[T], section: str, data: Mapping[str, Any]) -> T:
    """A dataclass ``cls`` from plain ``data``. Raises ``InputError`` on unknown, missing and mistyped keys."""
    hints = hints_of(cls)  # type: ignore[arg-type]  # a class is hashable
    data = table(section, data)
    known_keys(section, data, hints)
    for f in fields(cls):  # type: ignore[arg-type]
        if f.name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"{section} has no {f.name!r}, which it needs")
    return cls(**{key: typed(f"{section}.{key}", value, hints[key]) for key, value in data.items()})


def read_file(path: str | Path, what: str) -> Any:
    """The plain data in the JSON or TOML file (by suffix) at ``path``; ``what`` says what the file should be.

    Raises ``InputError`` when the file is missing, is a folder, cannot be read, or is not valid (with line and column).
    """
    try:
        path = Path(path)
        if path.is_dir():
            raise InputError(f"{what} {shown(str(path))} is a folder; allowed: a file")
        content = path.read_text(encoding="utf-8-sig")
        return _from_toml(content, path, what) if path.suffix.lower() == ".toml" else json.loads(content)
    except FileNotFoundError:
        raise InputError(f"{what} {shown(str(path))} does not exist") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what} {shown(str(path))} is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{what} {shown(str(path))} is not a UTF-8 text file") from None
    except OSError as error:
        raise InputError(f"{what} {shown(str(path))} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise InputError(f"{what} {shown(str(path))} is nested too deeply") from None
    except InputError:
        raise
    except (ValueError, TypeError) as error:  # a path with a NUL byte, a number of 5,000 digits
        raise InputError(f"{what} {shown(str(path))} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _from_toml(content: str, path: Path, what: str) -> Any:
    import tomllib  # which takes milliseconds to load, and few files are TOML

    try:
        return tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{what} {shown(str(path))} is not valid TOML: {' '.join(str(error).split())[:200]}") from None
