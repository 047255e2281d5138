"""A gate's answer for other programs: JUnit XML, Markdown, GitHub annotations."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from pathlib import Path

from estimator.errors import InputError
from validator.gate.baseline import Environment
from validator.gate.decide import Gate, Verdict, shown
from validator.gate.pace import Pace

_MARKS = {"pass": "✅", "improved": "🚀", "regressed": "❌", "inconclusive": "❔"}


def value_text(metric: str, value: float | None) -> str:
    """A metric's value for people."""
    return "-" if value is None else shown(metric, value)


def change_text(verdict: Verdict) -> str:
    """The change with its interval; prediction errors in points (pp)."""
    if verdict.change is None:
        return "-"
    if verdict.metric == "peak_allocated_bytes":
        return f"{verdict.change:+.2%}" if verdict.change else "0"
    unit = " pp" if verdict.metric.endswith("_error") else " %"
    ends = ""
    if verdict.low is not None and verdict.high is not None:
        ends = f" ({100 * verdict.low:+.1f} to {100 * verdict.high:+.1f})"
    return f"{100 * verdict.change:+.1f}{unit}{ends}"


def junit(gate: Gate, environment: Environment, strict: bool) -> str:
    """JUnit XML: one test case per metric; ``inconclusive`` is skipped, or with ``strict`` a failure."""
    failed = [v for v in gate.verdicts if v.status == "regressed" or (strict and v.status == "inconclusive")]
    skipped = 0 if strict else len(gate.inconclusive)
    counts = {"tests": str(len(gate.verdicts)), "failures": str(len(failed)), "errors": "0", "skipped": str(skipped)}
    suite = ET.Element("testsuite", {"name": "zerocast check", **counts})
    properties = ET.SubElement(suite, "properties")
    for name, value in environment.items():
        ET.SubElement(properties, "property", {"name": name, "value": value or "none"})
    for verdict in gate.verdicts:
        element = ET.SubElement(suite, "testcase", {"classname": verdict.case, "name": verdict.metric})
        if verdict in failed:
            ET.SubElement(element, "failure", {"type": verdict.status, "message": verdict.reason})
        elif verdict.status == "inconclusive":
            ET.SubElement(element, "skipped", {"message": verdict.reason})
        else:
            ET.SubElement(element, "system-out").text = f"{verdict.status}: {verdict.reason}"
    ET.indent(suite)
    return ET.tostring(suite, encoding="utf-8", xml_declaration=True).decode() + "\n"


def markdown(gate: Gate, environment: Environment) -> str:
    """A table for a GitHub step summary, the worst first."""
    order = ("regressed", "inconclusive", "improved", "pass")
    lines = [
        f"### zerocast check: {headline(gate)}", "",
        "Environment: " + ", ".join(f"{k} {v}" for k, v in environment.items() if v), "",
        "| | case | metric | baseline | now | change | runs |", "|---|---|---|---:|---:|---:|---:|",
    ]  # fmt: skip
    for v in sorted(gate.verdicts, key=lambda v: order.index(v.status)):
        cells = [f"{_MARKS[v.status]} {v.status}", v.case, v.metric, value_text(v.metric, v.baseline)]
        cells += [value_text(v.metric, v.now), change_text(v), f"{v.n_baseline} / {v.n_now}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    notes = [f"- {v.case}, {v.metric}: {v.reason}" for v in (*gate.regressed, *gate.inconclusive)]
    notes += [f"- {line}" for line in pace_lines(gate)]
    return "\n".join([*lines, *(["", *notes] if notes else []), ""]) + "\n"


def pace_lines(gate: Gate) -> list[str]:
    """By how much the machine's own speed differed, case by case where it was taken out."""
    lines = {}
    for v in gate.verdicts:
        if v.machine is not None:
            lines[v.case] = f"{v.case}: {Pace(change=v.machine, taken_out=v.taken_out).text} (yardstick)"
    return list(lines.values())


def headline(gate: Gate) -> str:
    """How many verdicts of each kind, e.g. ``1 regressed, 5 pass``."""
    counts = {s: sum(v.status == s for v in gate.verdicts) for s in ("regressed", "inconclusive", "improved", "pass")}
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n)


def github_lines(gate: Gate, strict: bool) -> list[str]:
    """Workflow commands of GitHub Actions: an error per regression, a warning (``strict``: an error) per open question."""
    return [
        f"::{'error' if v.status == 'regressed' or strict else 'warning'} "
        f"title={_escaped(f'{v.metric} {v.status}', ':,')}::{_escaped(f'{v.case}: {v.reason}')}"
        for v in (*gate.regressed, *gate.inconclusive)
    ]


def _escaped(text: str, also: str = "") -> str:
    """The escapes that workflow commands ask for (``actions/toolkit``, ``command.ts``)."""
    for char in "%\r\n" + also:
        text = text.replace(char, f"%{ord(char):02X}")
    return text


def write(path: Path, text: str, *, append: bool = False) -> None:
    """Writes ``text``. Raises ``InputError`` when the place cannot be written."""
    try:
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise InputError(f"{os.fspath(path)!r} cannot be written: {error.strerror or error}") from None
