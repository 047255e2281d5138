"""Points of a calibration in progress, kept beside its profile so that an interrupted one can go on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from estimator.errors import InputError
from estimator.time.profile_file import write_json

FORMAT = "zerocast-calibration-partial"
_SAVE_EVERY_S = 2.0


class Partial:
    """Results so far, by task key, in ``<out>.partial`` (nowhere without ``out``).

    Points that another machine, GPU or torch took are not mixed in: they are dropped, and ``notes`` says so. Raises
    ``InputError`` for a file that is something else.
    """

    def __init__(self, out: str | Path | None, machine: dict[str, Any]) -> None:
        self.path = None if out is None else Path(f"{out}.partial")
        self.machine = machine
        self.done: dict[str, dict[str, Any]] = {}
        self.notes: tuple[str, ...] = ()
        self._saved_at = time.monotonic()
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise ValueError
            machine, done = dict(data["machine"]), dict(data["done"])
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{str(path)!r} is not a calibration in progress; delete it to start afresh") from None
        differing = [k for k in sorted({*machine, *self.machine}) if machine.get(k) != self.machine.get(k)]
        if not differing:
            self.done = done
            return
        what = ", ".join(f"{k} {machine.get(k)!r} instead of {self.machine.get(k)!r}" for k in differing)
        self.notes = (f"{len(done)} points of an interrupted calibration were dropped: {what}",)

    def add(self, key: str, result: dict[str, Any]) -> None:
        """Keep a result; the file is at most two seconds behind."""
        self.done[key] = result
        if time.monotonic() - self._saved_at > _SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        if self.path is not None and self.done:
            write_json({"format": FORMAT, "machine": self.machine, "done": self.done}, self.path)
            self._saved_at = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
