"""The workflow file to copy: well-formed, and every command in it is one that this version understands."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from zerocast.cli import cli

yaml = pytest.importorskip("yaml")
TREE = Path(__file__).resolve().parents[2]
FILES = sorted((TREE / "docs" / "examples").glob("*.yml"))


def steps(file: Path) -> list[dict[str, Any]]:
    data = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert {"name", True, "jobs", "permissions"} <= set(data)  # YAML 1.1 reads "on" as true
    for job in data["jobs"].values():
        assert job["runs-on"] and job["timeout-minutes"] > 0
    return [step for job in data["jobs"].values() for step in job["steps"]]


def commands(file: Path) -> list[list[str]]:
    runs = [line for step in steps(file) for line in step.get("run", "").replace("\\\n", " ").splitlines()]
    return [words for line in runs if (words := shlex.split(line, comments=True))]


def check_command(words: list[str]) -> None:
    """Raises ``click.UsageError`` for an unknown command or flag, without running anything."""
    context = cli.make_context("zerocast", words[1:])
    name, command, rest = cli.resolve_command(context, [*context._protected_args, *context.args])
    while command is not None:
        context = command.make_context(name, rest, parent=context)
        if not isinstance(command, click.Group):
            return
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_step_is_one_action_or_known_commands(file: Path) -> None:
    for step in steps(file):
        assert ("uses" in step) != ("run" in step), step
        assert "uses" not in step or "@" in step["uses"]
    known = {"zerocast": check_command, "pip": None, "pytest": None, "python": None}
    for words in commands(file):
        assert words[0] in known, words
        if words[0] == "zerocast":
            check_command(words)
        if words[0] == "pytest":
            flags = {word.split("=")[0] for word in words if word.startswith("--")}
            source = (TREE / "zerocast" / "pytest_plugin.py").read_text(encoding="utf-8")
            assert all(f'"{flag}"' in source for flag in flags if flag.startswith("--zerocast")), flags


def test_the_gate_is_in_it_with_its_outputs() -> None:
    text = [" ".join(words) for file in FILES for words in commands(file)]
    assert any("--junit" in t and "--summary $GITHUB_STEP_SUMMARY" in t for t in text)
    assert any("--against" in t for t in text) and any("--update --measure" in t for t in text)
    uploads = [step for file in FILES for step in steps(file) if "upload-artifact" in step.get("uses", "")]
    assert uploads and all("zerocast-check.xml" in step["with"]["path"] for step in uploads)


@pytest.mark.parametrize(
    "words", [["zerocast", "chekc"], ["zerocast", "check", "--baselin", "x"], ["zerocast", "runs", "export"]]
)
def test_a_wrong_command_would_be_noticed(words: list[str]) -> None:
    with pytest.raises(click.UsageError):
        check_command(words)
